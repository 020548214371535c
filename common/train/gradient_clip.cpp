#include "common/train/gradient_clip.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>

#include <vector>

namespace flux {

double global_norm(std::span<const at::Tensor> gradients) {
  if (gradients.empty()) return 0;
  std::vector<at::Tensor> norms;
  norms.reserve(gradients.size());
  for (const at::Tensor& gradient : gradients) {
    norms.push_back(at::linalg_vector_norm(gradient, 2, c10::nullopt, false, at::kFloat));
  }
  // one value to fetch from the device
  return at::linalg_vector_norm(at::stack(norms).to(at::kDouble)).item<double>();
}

void clip_to_norm(std::span<const at::Tensor> gradients, double norm, double max_norm) {
  if (max_norm <= 0 || norm + 1e-6 <= max_norm) return;
  for (const at::Tensor& gradient : gradients) gradient.mul_(max_norm / (norm + 1e-6));
}

double clip_global_norm(std::span<const at::Tensor> gradients, double max_norm) {
  const double norm = global_norm(gradients);
  clip_to_norm(gradients, norm, max_norm);
  return norm;
}

}  // namespace flux
