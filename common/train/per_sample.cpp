#include "common/train/per_sample.h"

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/tensor/tensor.h"

namespace flux {

at::Tensor per_sample(const at::Tensor& values, const at::Tensor& like) {
  check_shape("sigma", values, {like.size(0)});
  std::vector<int64_t> shape(static_cast<size_t>(like.dim()), 1);
  shape[0] = like.size(0);
  return values.to(at::kFloat).view(shape);
}

}  // namespace flux
