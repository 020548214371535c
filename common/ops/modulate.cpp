#include "common/ops/modulate.h"

#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_layer_norm.h>
#include <torch/library.h>

namespace flux {
namespace {

// LibTorch has these two for Meta in Python only; shapes and allocations as its CPU kernels make
// them.
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Three layer_norm_meta(const at::Tensor& x,
                      c10::SymIntArrayRef normalized_shape,
                      const std::optional<at::Tensor>&,
                      const std::optional<at::Tensor>&,
                      double) {
  auto statistics = x.sizes().vec();
  for (size_t i = statistics.size() - normalized_shape.size(); i < statistics.size(); ++i)
    statistics[i] = 1;
  const auto options = x.options().dtype(at::kFloat);
  return {at::empty_like(x), at::empty(statistics, options), at::empty(statistics, options)};
}

Three layer_norm_backward_meta(const at::Tensor&,
                               const at::Tensor& x,
                               c10::SymIntArrayRef,
                               const at::Tensor&,
                               const at::Tensor&,
                               const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& bias,
                               std::array<bool, 3> wanted) {
  return {wanted[0] ? at::empty_like(x) : at::Tensor(),
          wanted[1] && weight ? at::empty_like(*weight) : at::Tensor(),
          wanted[2] && bias ? at::empty_like(*bias) : at::Tensor()};
}

TORCH_LIBRARY_IMPL(aten, Meta, library) {
  library.impl("native_layer_norm", layer_norm_meta);
  library.impl("native_layer_norm_backward", layer_norm_backward_meta);
}

}  // namespace

at::Tensor layer_norm(const at::Tensor& x, double eps) {
  return std::get<0>(at::native_layer_norm(x, {x.size(-1)}, {}, {}, eps));
}

at::Tensor modulate(const at::Tensor& x,
                    const at::Tensor& shift,
                    const at::Tensor& scale,
                    double eps) {
  return at::addcmul(shift, layer_norm(x, eps), scale + 1);
}

at::Tensor gated_residual(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& update) {
  return at::addcmul(x, gate, update);
}

}  // namespace flux
