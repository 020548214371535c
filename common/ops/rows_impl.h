// common/ops/rows_impl.h - from tensors to what the kernels of rows_kernel.h read. For the ops' own files and
// libflux_cuda.so.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "common/ops/rows_kernel.h"

namespace flux::kernel {

using MaybeTensor = std::optional<at::Tensor>;

/// Rows of x [B, N, width].
inline RowsShape rows_shape(const at::Tensor& x, int64_t group = 1) {
  return {x.size(0), x.size(1), x.size(2), group};
}

/// x [B, N, width] or, one row a sample, [B, 1, width]; the last dimension has stride 1.
template <class T>
Rows<T> rows_of(const at::Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.size(1) == 1 ? 0 : x.stride(1)};
}
template <class T>
Rows<T> rows_of(const MaybeTensor& x) {
  return x ? rows_of<T>(*x) : Rows<T>{};
}
inline float* floats(const MaybeTensor& x) { return x ? x->mutable_data_ptr<float>() : nullptr; }

// What the faces of the ops get; CPU and CUDA differ in the launch alone.

template <class T>
ModulateForward<T> modulate_args(const at::Tensor& x,
                                 const at::Tensor& shift,
                                 const at::Tensor& scale,
                                 double eps,
                                 const at::Tensor& out,
                                 const at::Tensor& stats) {
  return {rows_shape(x),
          rows_of<const T>(x),
          rows_of<const T>(shift),
          rows_of<const T>(scale),
          static_cast<float>(eps),
          rows_of<T>(out),
          stats.mutable_data_ptr<float>()};
}

template <class T>
ModulateBackward<T> modulate_args(const at::Tensor& grad,
                                  const at::Tensor& x,
                                  const at::Tensor& scale,
                                  const at::Tensor& stats,
                                  int64_t group,
                                  const MaybeTensor& grad_x,
                                  const MaybeTensor& sums) {
  return {rows_shape(x, group),
          rows_of<const T>(grad),
          rows_of<const T>(x),
          rows_of<const T>(scale),
          stats.const_data_ptr<float>(),
          rows_of<T>(grad_x),
          floats(sums)};
}

template <class T>
GatedForward<T> gated_args(const at::Tensor& x,
                           const at::Tensor& gate,
                           const at::Tensor& update,
                           const at::Tensor& out) {
  return {rows_shape(x),
          rows_of<const T>(x),
          rows_of<const T>(gate),
          rows_of<const T>(update),
          rows_of<T>(out)};
}

template <class T>
GatedBackward<T> gated_args(const at::Tensor& grad,
                            const at::Tensor& gate,
                            const MaybeTensor& update,
                            int64_t group,
                            const MaybeTensor& grad_update,
                            const MaybeTensor& sums) {
  return {rows_shape(grad, group),
          rows_of<const T>(grad),
          rows_of<const T>(gate),
          rows_of<const T>(update),
          rows_of<T>(grad_update),
          floats(sums)};
}

/// sums [B, groups, width], out [B, width].
template <class T>
GroupSums<T> group_sums_args(const at::Tensor& sums, const at::Tensor& out) {
  return {{sums.size(0), sums.size(1), sums.size(2), 1},
          sums.const_data_ptr<float>(),
          static_cast<T*>(out.data_ptr())};
}

template <class T>
GeluForward<T> gelu_args(const at::Tensor& x, const at::Tensor& out) {
  return {rows_shape(x), rows_of<const T>(x), rows_of<T>(out)};
}
template <class T>
GeluBackward<T> gelu_args(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grad_x) {
  return {rows_shape(x), rows_of<const T>(grad), rows_of<const T>(x), rows_of<T>(grad_x)};
}

/// sums [B, groups].
template <class T>
LossForward<T> loss_args(const at::Tensor& prediction,
                         const at::Tensor& target,
                         const MaybeTensor& mask,
                         const at::Tensor& c,
                         int64_t type,
                         int64_t group,
                         const at::Tensor& sums) {
  return {rows_shape(prediction, group),
          rows_of<const T>(prediction),
          rows_of<const float>(target),
          rows_of<const float>(mask),
          c.const_data_ptr<float>(),
          static_cast<LossType>(type),
          sums.mutable_data_ptr<float>()};
}
template <class T>
LossBackward<T> loss_backward_args(const at::Tensor& grad,
                                   const at::Tensor& prediction,
                                   const at::Tensor& target,
                                   const MaybeTensor& mask,
                                   const at::Tensor& c,
                                   int64_t type,
                                   const at::Tensor& grad_prediction) {
  return {rows_shape(prediction),
          grad.const_data_ptr<float>(),
          rows_of<const T>(prediction),
          rows_of<const float>(target),
          rows_of<const float>(mask),
          c.const_data_ptr<float>(),
          static_cast<LossType>(type),
          rows_of<T>(grad_prediction)};
}

}  // namespace flux::kernel
