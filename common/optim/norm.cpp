#include "common/optim/norm.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <algorithm>
#include <vector>

#include "common/optim/adafactor_cpu.h"

namespace flux {

double sum_of_squares(const at::Tensor& tensor) {
  if (tensor.numel() == 0 || tensor.is_meta()) return 0;
  const bool bf16 = tensor.scalar_type() == at::kBFloat16;
  if (!tensor.is_cpu() || !tensor.is_contiguous() ||
      (!bf16 && tensor.scalar_type() != at::kFloat)) {
    const double norm =
        at::linalg_vector_norm(tensor, 2, c10::nullopt, false, at::kDouble).item<double>();
    return norm * norm;
  }
  Operands o{};
  o.parameter = const_cast<void*>(tensor.const_data_ptr());  // only read
  o.n = tensor.numel();
  o.keep = bf16 ? Keep::kNearest : Keep::kFloat;
  std::vector<double> sums(static_cast<size_t>(adafactor_num_parts(o.n)));
  at::parallel_for(0, static_cast<int64_t>(sums.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part * kAdafactorPart;
      sums[static_cast<size_t>(part)] =
          weight_squares(o, begin, std::min(o.n, begin + kAdafactorPart));
    }
  });
  double sum = 0;
  for (const double part : sums) sum += part;
  return sum;
}

}  // namespace flux
