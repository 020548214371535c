// common/ops/qk_norm_rope_cpu.cpp - the CPU kernels: rows of the shared text, a thread a range of
// rows.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "common/ops/qk_norm_rope_impl.h"

namespace flux::kernel {
namespace {

// Of the scales' gradient: fixed, so that the result does not depend on the number of threads.
constexpr int64_t kRowsPerGroup = 2048;
// Fewer rows than this are not worth a second thread.
constexpr int64_t kRowsPerThread = 256;

constexpr auto kAlone = [](float value) { return value; };

}  // namespace

QkvTuple qk_norm_rope_cpu(const at::Tensor& qkv,
                          const at::Tensor& query_scale,
                          const at::Tensor& key_scale,
                          const at::Tensor& rope_cos,
                          const at::Tensor& rope_sin,
                          double eps) {
  const int64_t head = query_scale.size(0), heads = qkv.size(2) / (3 * head);
  const auto result = [&] {
    return at::empty({qkv.size(0), qkv.size(1), heads, head}, qkv.options());
  };
  const QkvTuple out{result(), result(), result()};
  const auto run = [&]<class T>(T) {
    const auto args = forward_args<T>(qkv, query_scale, key_scale, rope_cos, rope_sin, eps, out);
    at::parallel_for(0, args.shape.num_rows(), kRowsPerThread, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) forward_row(args, row, 0, 1, kAlone);
    });
  };
  qkv.scalar_type() == at::kBFloat16 ? run(at::BFloat16{}) : run(float{});
  return out;
}

std::tuple<at::Tensor, at::Tensor> qk_norm_rope_backward_cpu(const at::Tensor& grad_q,
                                                             const at::Tensor& grad_k,
                                                             const at::Tensor& grad_v,
                                                             const at::Tensor& qkv,
                                                             const at::Tensor& query_scale,
                                                             const at::Tensor& key_scale,
                                                             const at::Tensor& rope_cos,
                                                             const at::Tensor& rope_sin,
                                                             double eps,
                                                             bool want_scales) {
  const auto grad_qkv = at::empty(qkv.sizes(), qkv.options());
  at::Tensor partial;
  const auto run = [&]<class T>(T) {
    auto args = backward_args<T>({grad_q, grad_k, grad_v},
                                 qkv,
                                 query_scale,
                                 key_scale,
                                 rope_cos,
                                 rope_sin,
                                 eps,
                                 grad_qkv,
                                 at::Tensor(),
                                 kRowsPerGroup);
    if (want_scales) {
      partial = at::zeros({args.num_groups(), 2, args.shape.head}, query_scale.options());
      args.grad_scale = partial.mutable_data_ptr<float>();
    }
    at::parallel_for(0, args.num_groups(), 1, [&](int64_t first, int64_t last) {
      for (int64_t group = first; group < last; ++group) backward_group(args, group, 0, 1, kAlone);
    });
  };
  qkv.scalar_type() == at::kBFloat16 ? run(at::BFloat16{}) : run(float{});
  return {grad_qkv, want_scales ? partial.sum(0) : at::Tensor()};
}

}  // namespace flux::kernel
