// common/ops/qk_norm_rope_impl.h - what the kernels of the op flux::qk_norm_rope get and give, and
// the CPU ones. For the op's own files and libflux_cuda.so.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "common/ops/qk_norm_rope_kernel.h"

namespace flux::kernel {

using QkvTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// Scales float32, tables float32 and contiguous. Returns q, k, v [B, N, heads, head].
QkvTuple qk_norm_rope_cpu(const at::Tensor& qkv,
                          const at::Tensor& query_scale,
                          const at::Tensor& key_scale,
                          const at::Tensor& rope_cos,
                          const at::Tensor& rope_sin,
                          double eps);
/// Gradients contiguous. Returns d(qkv) and, if wanted, d(scales) [2, head] float32 (else
/// undefined).
std::tuple<at::Tensor, at::Tensor> qk_norm_rope_backward_cpu(const at::Tensor& grad_q,
                                                             const at::Tensor& grad_k,
                                                             const at::Tensor& grad_v,
                                                             const at::Tensor& qkv,
                                                             const at::Tensor& query_scale,
                                                             const at::Tensor& key_scale,
                                                             const at::Tensor& rope_cos,
                                                             const at::Tensor& rope_sin,
                                                             double eps,
                                                             bool want_scales);

/// Strides and sizes of a call.
inline QkNormRopeShape shape_of(const at::Tensor& qkv,
                                const at::Tensor& query_scale,
                                const at::Tensor& rope_cos,
                                double eps) {
  QkNormRopeShape s;
  s.batch = qkv.size(0);
  s.tokens = qkv.size(1);
  s.head = query_scale.size(0);
  s.heads = qkv.size(2) / (3 * s.head);
  s.batch_stride = qkv.stride(0);
  s.token_stride = qkv.stride(1);
  s.rope_batch_stride = rope_cos.size(0) == 1 ? 0 : rope_cos.stride(0);
  s.eps = static_cast<float>(eps);
  return s;
}

/// Pointers of a forward call; `out` are the three results.
template <class T>
QkNormRopeForward<T> forward_args(const at::Tensor& qkv,
                                  const at::Tensor& query_scale,
                                  const at::Tensor& key_scale,
                                  const at::Tensor& rope_cos,
                                  const at::Tensor& rope_sin,
                                  double eps,
                                  const QkvTuple& out) {
  const auto data = [](const at::Tensor& t) { return static_cast<T*>(t.data_ptr()); };
  return {shape_of(qkv, query_scale, rope_cos, eps),
          data(qkv),
          {query_scale.const_data_ptr<float>(), key_scale.const_data_ptr<float>()},
          rope_cos.const_data_ptr<float>(),
          rope_sin.const_data_ptr<float>(),
          {data(std::get<0>(out)), data(std::get<1>(out)), data(std::get<2>(out))}};
}

/// Pointers of a backward call; `grad_scale` [groups, 2, head] may be undefined.
template <class T>
QkNormRopeBackward<T> backward_args(const QkvTuple& grads,
                                    const at::Tensor& qkv,
                                    const at::Tensor& query_scale,
                                    const at::Tensor& key_scale,
                                    const at::Tensor& rope_cos,
                                    const at::Tensor& rope_sin,
                                    double eps,
                                    const at::Tensor& grad_qkv,
                                    const at::Tensor& grad_scale,
                                    int64_t rows_per_group) {
  const auto data = [](const at::Tensor& t) { return static_cast<T*>(t.data_ptr()); };
  return {shape_of(qkv, query_scale, rope_cos, eps),
          data(qkv),
          {query_scale.const_data_ptr<float>(), key_scale.const_data_ptr<float>()},
          rope_cos.const_data_ptr<float>(),
          rope_sin.const_data_ptr<float>(),
          {data(std::get<0>(grads)), data(std::get<1>(grads)), data(std::get<2>(grads))},
          data(grad_qkv),
          grad_scale.defined() ? grad_scale.mutable_data_ptr<float>() : nullptr,
          rows_per_group};
}

/// The forward face of a device: makes the results, and has `launch` write them. Half: the device's bfloat16.
template <class Half, class Launch>
QkvTuple run_forward(const at::Tensor& qkv,
                     const at::Tensor& query_scale,
                     const at::Tensor& key_scale,
                     const at::Tensor& rope_cos,
                     const at::Tensor& rope_sin,
                     double eps,
                     const Launch& launch) {
  const int64_t head = query_scale.size(0), heads = qkv.size(2) / (3 * head);
  const auto result = [&] {
    return at::empty({qkv.size(0), qkv.size(1), heads, head}, qkv.options());
  };
  const QkvTuple out{result(), result(), result()};
  const auto run = [&]<class T>(T) {
    launch(forward_args<T>(qkv, query_scale, key_scale, rope_cos, rope_sin, eps, out));
  };
  qkv.scalar_type() == at::kBFloat16 ? run(Half{}) : run(float{});
  return out;
}

/// The backward face: the sums of the scales' gradient go by groups of `rows_per_group` rows.
template <class Half, class Launch>
std::tuple<at::Tensor, at::Tensor> run_backward(const QkvTuple& grads,
                                                const at::Tensor& qkv,
                                                const at::Tensor& query_scale,
                                                const at::Tensor& key_scale,
                                                const at::Tensor& rope_cos,
                                                const at::Tensor& rope_sin,
                                                double eps,
                                                bool want_scales,
                                                int64_t rows_per_group,
                                                const Launch& launch) {
  const auto grad_qkv = at::empty(qkv.sizes(), qkv.options());
  at::Tensor partial;
  const auto run = [&]<class T>(T) {
    auto args = backward_args<T>(grads,
                                 qkv,
                                 query_scale,
                                 key_scale,
                                 rope_cos,
                                 rope_sin,
                                 eps,
                                 grad_qkv,
                                 at::Tensor(),
                                 rows_per_group);
    if (want_scales) {
      partial = at::zeros({args.num_groups(), 2, args.shape.head}, query_scale.options());
      args.grad_scale = partial.mutable_data_ptr<float>();
    }
    launch(args);
  };
  qkv.scalar_type() == at::kBFloat16 ? run(Half{}) : run(float{});
  return {grad_qkv, want_scales ? partial.sum(0) : at::Tensor()};
}

}  // namespace flux::kernel
