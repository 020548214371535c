// tests/support/tiny_flux.h - a random FLUX transformer of one double and one single block, as a
// file.
#pragma once
#include <ATen/ATen.h>

#include <cmath>
#include <filesystem>

#include "common/core/rng.h"
#include "common/models/flux/config.h"
#include "common/models/flux/names.h"
#include "common/tensor/weight_file.h"

namespace flux::test {

/// Takes prompt embeddings of width 16 and pooled ones of width 8, as TrainingCaches makes them.
inline dit::Config tiny_flux_config(bool guidance = true) {
  dit::Config config;
  config.pooled_dim = 8;
  config.prompt_dim = 16;
  config.hidden = 128;
  config.mlp = 512;
  config.num_heads = 1;
  config.num_double_blocks = 1;
  config.num_single_blocks = 1;
  config.guidance = guidance;
  return config;
}

inline TensorMap tiny_flux(const dit::Config& config, uint64_t seed) {
  TensorMap tensors;
  uint64_t number = 0;
  for (const auto& [name, shape] : dit::tensor_shapes(config)) {
    at::Tensor values = at::empty(shape, at::kFloat);
    RandomStream(seed, Purpose::kTinyModel, number++)
        .fill_normal({values.mutable_data_ptr<float>(), static_cast<size_t>(values.numel())});
    const bool scale = name.ends_with("_norm.scale");
    values = scale ? 1 + 0.1 * values
                   : values / std::sqrt(static_cast<double>(shape.size() > 1 ? shape[1] : 100));
    tensors[name] = values.to(at::kBFloat16);
  }
  return tensors;
}

inline std::filesystem::path write_tiny_flux(const std::filesystem::path& file,
                                             bool guidance = true,
                                             uint64_t seed = 1) {
  write_weights(file, tiny_flux(tiny_flux_config(guidance), seed), {});
  return file;
}

}  // namespace flux::test
