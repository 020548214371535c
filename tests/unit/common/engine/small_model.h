// tests/unit/common/engine/small_model.h - a transformer of a few thousand weights and batches for it.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>

#include <cmath>
#include <filesystem>
#include <vector>

#include "common/engine/block_loop.h"
#include "common/models/flux/names.h"
#include "common/models/flux/packing.h"
#include "common/tensor/weight_file.h"

namespace flux::engine {

inline dit::Config small_config(int64_t num_double = 2, int64_t num_single = 3) {
  dit::Config config;
  config.hidden = 96;
  config.num_heads = 3;
  config.mlp = 128;
  config.axes = {4, 14, 14};
  config.pooled_dim = 24;
  config.prompt_dim = 40;
  config.in_channels = config.out_channels = 16;
  config.num_double_blocks = num_double;
  config.num_single_blocks = num_single;
  return config;
}

/// Random weights of every tensor, in a file of bfloat16.
inline void write_small_model(const dit::Config& config, const std::filesystem::path& path) {
  const auto gen = at::make_generator<at::CPUGeneratorImpl>(4);
  TensorMap tensors;
  for (const auto& [name, shape] : dit::tensor_shapes(config)) {
    const double size = shape.size() == 2 ? 1.5 / std::sqrt(static_cast<double>(shape[1])) : 0.3;
    tensors[name] = at::randn(shape, gen).mul_(size).to(at::kBFloat16);
  }
  write_weights(path, tensors, {});
}

/// Micro-batches of two resolutions, the first with a text mask.
inline std::vector<MicroBatch> small_batches(const dit::Config& config,
                                             int64_t count,
                                             bool masks,
                                             at::Device device = at::kCPU,
                                             uint64_t seed = 11) {
  const auto gen = at::make_generator<at::CPUGeneratorImpl>(seed);
  std::vector<MicroBatch> out;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t batch = 1 + i % 2, rows = i % 2 ? 8 : 6, columns = 4, length = 5;
    const int64_t tokens = rows / 2 * columns / 2;
    dit::Inputs in;
    in.img = at::randn({batch, tokens, config.in_channels}, gen).to(device);
    in.txt = at::randn({batch, length, config.prompt_dim}, gen).to(device);
    in.y = at::randn({batch, config.pooled_dim}, gen).to(device);
    in.timestep = at::rand({batch}, gen).to(device);
    in.guidance = at::ones({batch}).to(device);
    in.img_ids = dit::image_ids(rows, columns).to(device);
    in.txt_ids = dit::text_ids(length).to(device);
    if (masks && i == 0) {
      auto mask = at::ones({batch, length}, at::kBool);
      mask.narrow(1, 3, 2).zero_();
      in.text_mask = mask.to(device);
    }
    const auto target = at::randn({batch, tokens, config.out_channels}, gen).to(device);
    const auto loss_mask = at::rand({batch, tokens, 1}, gen).to(device);
    out.push_back({in, [=](const at::Tensor& velocity) {
                     const auto difference = velocity.to(at::kFloat) - target;
                     auto squares = difference * difference;
                     if (masks) squares = squares * loss_mask;
                     return squares.mean() * (1.0 / static_cast<double>(count));
                   }});
  }
  return out;
}

}  // namespace flux::engine
