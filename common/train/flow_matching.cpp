#include "common/train/flow_matching.h"

#include <ATen/core/Tensor.h>

#include "common/tensor/tensor.h"
#include "common/train/per_sample.h"

namespace flux {

at::Tensor noised_latents(const at::Tensor& latents,
                          const at::Tensor& noise,
                          const at::Tensor& sigma) {
  check_shape("noise", noise, latents.sizes());
  const at::Tensor s = per_sample(sigma, latents);  // [B, 1, 1, 1]
  return ((1 - s) * latents.to(at::kFloat) + s * noise.to(at::kFloat)).to(latents.scalar_type());
}

at::Tensor velocity_target(const at::Tensor& latents, const at::Tensor& noise) {
  check_shape("noise", noise, latents.sizes());
  return noise - latents;
}

}  // namespace flux
