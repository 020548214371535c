// common/train/flow_matching.h - the noised input and the target of rectified flow.
#pragma once
#include "common/tensor/fwd.h"  // at::Tensor by name only: a torch header costs seconds per file

namespace flux {

/// Latents mixed with noise: x_t = (1 - sigma) * latents + sigma * noise, computed in float32.
///
///   latents  [B, 16, H/8, W/8] float32|bfloat16; shifted and scaled VAE latents
///   noise    shape, dtype and device of latents; standard normal
///   sigma    [B] float32 in [0, 1]: 0 = clean, 1 = pure noise. In FLUX sigma == timestep.
///   returns  shape, dtype and device of latents
///
/// Throws std::invalid_argument, naming the argument and both shapes, if they disagree.
/// Source: Esser et al. 2024, arXiv:2403.03206, section 3 (rectified flow).
at::Tensor noised_latents(const at::Tensor& latents,
                          const at::Tensor& noise,
                          const at::Tensor& sigma);

/// What the model must predict: velocity = noise - latents, the slope of x_t in sigma.
at::Tensor velocity_target(const at::Tensor& latents, const at::Tensor& noise);

}  // namespace flux
