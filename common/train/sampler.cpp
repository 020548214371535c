#include "common/train/sampler.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <stdexcept>

#include "common/train/timesteps.h"

namespace flux {

std::vector<float> sampler_schedule(int64_t num_steps, int64_t num_image_tokens, bool shift) {
  if (num_steps < 1)
    throw std::invalid_argument(fmt::format("{} sampling steps, at least 1 is needed", num_steps));
  std::vector<float> sigmas(static_cast<size_t>(num_steps) + 1);
  const double mu = flux_shift_mu(num_image_tokens);
  for (int64_t i = 0; i <= num_steps; ++i) {
    const double sigma = static_cast<double>(num_steps - i) / static_cast<double>(num_steps);
    sigmas[static_cast<size_t>(i)] =
        static_cast<float>(shift ? flux_shifted_sigma(sigma, mu) : sigma);
  }
  return sigmas;
}

at::Tensor euler_step(const at::Tensor& x,
                      const at::Tensor& velocity,
                      double sigma,
                      double next_sigma) {
  return (x.to(at::kFloat) + (next_sigma - sigma) * velocity.to(at::kFloat)).to(x.scalar_type());
}

}  // namespace flux
