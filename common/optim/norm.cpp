#include "common/optim/norm.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/square.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/optim/adafactor_cpu.h"

namespace flux {

std::vector<double> squares_by_part(const at::Tensor& tensor) {
  std::vector<double> sums(static_cast<size_t>((tensor.numel() + kSquaresPart - 1) / kSquaresPart));
  if (tensor.is_meta() || tensor.numel() == 0) return sums;
  const bool bf16 = tensor.scalar_type() == at::kBFloat16;
  if (!tensor.is_cpu() || !tensor.is_contiguous() ||
      (!bf16 && tensor.scalar_type() != at::kFloat)) {
    const at::Tensor flat = tensor.reshape({-1});
    const int64_t whole = flat.numel() / kSquaresPart * kSquaresPart;
    std::vector<at::Tensor> norms;
    for (const auto& rows : {flat.narrow(0, 0, whole).view({-1, kSquaresPart}),
                             flat.narrow(0, whole, flat.numel() - whole).view({1, -1})})
      if (rows.numel() > 0)
        norms.push_back(at::linalg_vector_norm(rows, 2, 1, false, at::kDouble).square().cpu());
    size_t next = 0;
    for (const at::Tensor& of_rows : norms)
      for (int64_t i = 0; i < of_rows.numel(); ++i)
        sums[next++] = of_rows.const_data_ptr<double>()[i];
    return sums;
  }
  Operands o{};
  o.parameter = const_cast<void*>(tensor.const_data_ptr());  // only read
  o.n = tensor.numel();
  o.keep = bf16 ? Keep::kNearest : Keep::kFloat;
  at::parallel_for(0, static_cast<int64_t>(sums.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part * kSquaresPart;
      sums[static_cast<size_t>(part)] =
          weight_squares(o, begin, std::min(o.n, begin + kSquaresPart));
    }
  });
  return sums;
}

double sum_of_squares(const at::Tensor& tensor) {
  if (tensor.is_cuda()) {  // one number has to come from there, not one a part
    const double norm =
        at::linalg_vector_norm(tensor, 2, c10::nullopt, false, at::kDouble).item<double>();
    return norm * norm;
  }
  const auto sums = squares_by_part(tensor);
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace flux
