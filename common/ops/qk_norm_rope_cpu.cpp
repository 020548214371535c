// common/ops/qk_norm_rope_cpu.cpp - the CPU kernels: rows of the shared text, a thread a range of
// rows.
#include <ATen/Parallel.h>

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
  const auto launch = [](const auto& args) {
    at::parallel_for(0, args.shape.num_rows(), kRowsPerThread, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) forward_row(args, row, 0, 1, kAlone);
    });
  };
  return run_forward<at::BFloat16>(qkv, query_scale, key_scale, rope_cos, rope_sin, eps, launch);
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
  const auto launch = [](const auto& args) {
    at::parallel_for(0, args.num_groups(), 1, [&](int64_t first, int64_t last) {
      for (int64_t group = first; group < last; ++group) backward_group(args, group, 0, 1, kAlone);
    });
  };
  return run_backward<at::BFloat16>({grad_q, grad_k, grad_v},
                                    qkv,
                                    query_scale,
                                    key_scale,
                                    rope_cos,
                                    rope_sin,
                                    eps,
                                    want_scales,
                                    kRowsPerGroup,
                                    launch);
}

}  // namespace flux::kernel
