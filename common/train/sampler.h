// common/train/sampler.h - the noise levels of a sampling run, and one Euler step along the
// velocity.
#pragma once
#include <cstdint>
#include <vector>

#include "common/tensor/fwd.h"

namespace flux {

/// `num_steps` + 1 sigmas from 1 to 0, evenly spaced; with `shift` (dev; not schnell) each goes
/// through flux_shifted_sigma with the mu of `num_image_tokens`. Throws std::invalid_argument
/// unless num_steps > 0. Source: Black Forest Labs' flux, sampling.py: get_schedule.
std::vector<float> sampler_schedule(int64_t num_steps, int64_t num_image_tokens, bool shift);

/// x + (next_sigma - sigma) * velocity, computed in float32, in the dtype of x.
at::Tensor euler_step(const at::Tensor& x,
                      const at::Tensor& velocity,
                      double sigma,
                      double next_sigma);

}  // namespace flux
