#include "pipelines/lora/svd.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/tensor/tensor.h"

namespace flux::lora_tools {
namespace {

constexpr int64_t kSmall = 768;  // sides up to here take less than a second
constexpr int64_t kOversampling = 16;
constexpr int kIterations = 6;

at::Tensor wide(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? tensor
                                             : to_dtype(tensor, at::kFloat).to(at::kDouble);
}

Svd dense(const at::Tensor& matrix) {
  auto [u, s, v] = at::linalg_svd(wide(matrix), /*full_matrices=*/false);
  const double square_norm = s.square().sum().item<double>();
  return {u, s, v, square_norm};
}

}  // namespace

Svd svd_of_product(const at::Tensor& up, const at::Tensor& down, double scale) {
  const int64_t rank = down.size(0);
  if (rank >= std::min(up.size(0), down.size(1)))
    return dense(at::mm(wide(up), wide(down)) * scale);
  const auto [qu, ru] = at::linalg_qr(wide(up));
  const auto [qd, rd] = at::linalg_qr(wide(down).t().contiguous());
  Svd out = dense(at::mm(ru, rd.t()) * scale);
  out.u = at::mm(qu, out.u);
  out.v = at::mm(out.v, qd.t());
  return out;
}

Svd largest_singular_values(const at::Tensor& matrix, int64_t rank, const std::string& name) {
  const int64_t small = std::min(matrix.size(0), matrix.size(1)),
                k = std::min(small, rank + kOversampling);
  if (small <= kSmall || 2 * k >= small) return dense(matrix);
  const at::Tensor m = to_dtype(matrix, at::kFloat);
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(xxh3_64(as_bytes(name)));
  at::Tensor q = std::get<0>(at::linalg_qr(at::mm(m, at::randn({m.size(1), k}, generator))));
  for (int i = 0; i < kIterations; ++i) {
    const at::Tensor back = std::get<0>(at::linalg_qr(at::mm(m.t(), q)));
    q = std::get<0>(at::linalg_qr(at::mm(m, back)));
  }
  Svd out = dense(at::mm(q.t(), m));
  out.u = at::mm(wide(q), out.u);
  out.square_norm = 0;
  constexpr int64_t kRows = 1024;  // at a time: in double a matrix is as large as two of float32
  for (int64_t row = 0; row < m.size(0); row += kRows)
    out.square_norm +=
        wide(m.narrow(0, row, std::min(kRows, m.size(0) - row))).square().sum().item<double>();
  return out;
}

int64_t choose_rank(const RankRule& rule, const Svd& svd) {
  const at::Tensor s = svd.s.contiguous();
  const double* values = s.const_data_ptr<double>();
  const int64_t n = s.numel();
  int64_t count = n;
  if (rule.sv_ratio) {
    count =
        std::count_if(values, values + n, [&](double v) { return v > values[0] / *rule.sv_ratio; });
  } else if (rule.sv_frobenius || rule.sv_cumulative) {
    const double total = rule.sv_frobenius ? svd.square_norm : s.sum().item<double>();
    const double wanted =
        (rule.sv_frobenius ? *rule.sv_frobenius * *rule.sv_frobenius : *rule.sv_cumulative) * total;
    double sum = 0;
    for (count = 0; count < n && sum < wanted; ++count)
      sum += rule.sv_frobenius ? values[count] * values[count] : values[count];
  }
  return std::clamp<int64_t>(count, 1, std::min(n, rule.rank.value_or(n)));
}

lora::Module pair_of(const Svd& svd, int64_t rank, const std::string& path) {
  const at::Tensor root = svd.s.narrow(0, 0, rank).sqrt();
  lora::Module out{path,
                   (root.unsqueeze(1) * svd.v.narrow(0, 0, rank)).to(at::kFloat),
                   (svd.u.narrow(1, 0, rank) * root).to(at::kFloat),
                   static_cast<double>(rank)};
  return out;
}

double relative_error(const Svd& svd, int64_t rank) {
  if (svd.square_norm <= 0) return 0;
  const double kept = svd.s.narrow(0, 0, rank).square().sum().item<double>();
  return std::sqrt(std::max(0.0, 1 - kept / svd.square_norm));
}

void reduce(lora::Module& module, const RankRule& rule, double& error) {
  const lora::Module pair = lora::without_lokr(module);
  if (!rule.has_threshold() && pair.rank() <= rule.rank.value_or(pair.rank())) return;
  const Svd svd = svd_of_product(pair.up, pair.down, pair.scale());
  const int64_t rank = choose_rank(rule, svd);
  if (rank >= pair.rank()) return;
  error = std::max(error, relative_error(svd, rank));
  module = pair_of(svd, rank, pair.path);
  module.magnitude = pair.magnitude;
}

double delta_norm(const lora::Module& module) {
  double norm = 0;
  const at::Tensor down = wide(module.down);
  if (module.up.defined()) {
    // ||up down||^2 = sum of up^T up times down down^T
    const at::Tensor up = wide(module.up);
    const double square = (at::mm(up.t(), up) * at::mm(down, down.t())).sum().item<double>();
    norm = std::sqrt(std::max(0.0, square));
  } else {
    norm = down.norm().item<double>();
  }
  if (module.mix.defined()) norm *= wide(module.mix).norm().item<double>();
  return norm * std::abs(module.scale());
}

}  // namespace flux::lora_tools
