// common/train/euler.h - pictures' latents from noise: Euler steps along the velocities of a model.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "common/models/flux/transformer.h"

namespace flux {

/// The velocities [B, N, out_channels] of some inputs, on the device of the model.
using Predict = std::function<std::vector<at::Tensor>(std::span<const dit::Inputs> inputs)>;

/// One picture on its way.
struct SampleInputs {
  at::Tensor noise;             // [1, 16, h, w] float32
  at::Tensor prompt_embedding;  // [1, L, X]
  at::Tensor pooled_embedding;  // [1, V]
  at::Tensor text_mask{};       // [1, L] bool, or undefined
  at::Tensor
      negative_embedding{};  // the same of what the picture shall not be; undefined without CFG
  at::Tensor negative_pooled{};
  at::Tensor negative_mask{};
};

struct EulerOptions {
  std::vector<float> sigmas;  // from 1 to 0, see sampler_schedule()
  double guidance = 3.5;      // read by a model with guidance only
  /// velocity = negative + cfg_scale * (velocity - negative), where inputs have a negative.
  double cfg_scale = 1;
};

using AfterStep = std::function<void(int64_t done, std::span<const at::Tensor> packed)>;

/// The latents of some pictures, [1, 16, h, w] float32 each. All pass through a block of the model while it is there; what one becomes does not depend
/// on the others, to the bit.
///   after_step  called with the number of steps done, from 1, and the packed latents; may be empty
/// Source: Black Forest Labs' flux, sampling.py: denoise.
std::vector<at::Tensor> euler_sample(const Predict& predict,
                                     const EulerOptions& options,
                                     std::span<const SampleInputs> pictures,
                                     const AfterStep& after_step = {});

/// Noise of a picture, [1, channels, h, w] float32: a stream of its own for each seed, prompt and index.
at::Tensor sample_noise(
    uint64_t seed, uint64_t prompt, uint64_t index, int64_t channels, int64_t h, int64_t w);

}  // namespace flux
