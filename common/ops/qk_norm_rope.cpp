// common/ops/qk_norm_rope.cpp - checks, dispatch and autograd of the op flux::qk_norm_rope.
#include "common/ops/qk_norm_rope.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <stdexcept>

#include "common/ops/qk_norm_rope_impl.h"
#include "common/tensor/tensor.h"

namespace flux {
namespace {

using kernel::QkvTuple;
using Grads = std::tuple<at::Tensor, at::Tensor>;
using Forward = QkvTuple(const at::Tensor&,
                         const at::Tensor&,
                         const at::Tensor&,
                         const at::Tensor&,
                         const at::Tensor&,
                         double);
using Backward = Grads(const at::Tensor&,
                       const at::Tensor&,
                       const at::Tensor&,
                       const at::Tensor&,
                       const at::Tensor&,
                       const at::Tensor&,
                       const at::Tensor&,
                       const at::Tensor&,
                       double,
                       bool);

QkvTuple call_forward(const at::Tensor& qkv,
                      const at::Tensor& query_scale,
                      const at::Tensor& key_scale,
                      const at::Tensor& cos,
                      const at::Tensor& sin,
                      double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flux::qk_norm_rope", "").typed<Forward>();
  return op.call(qkv, query_scale, key_scale, cos, sin, eps);
}

Grads call_backward(const at::Tensor& grad_q,
                    const at::Tensor& grad_k,
                    const at::Tensor& grad_v,
                    const at::Tensor& qkv,
                    const at::Tensor& query_scale,
                    const at::Tensor& key_scale,
                    const at::Tensor& cos,
                    const at::Tensor& sin,
                    double eps,
                    bool want_scales) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flux::qk_norm_rope_backward", "")
                             .typed<Backward>();
  return op.call(grad_q, grad_k, grad_v, qkv, query_scale, key_scale, cos, sin, eps, want_scales);
}

struct QkNormRope : torch::autograd::Function<QkNormRope> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context,
                                                const at::Tensor& qkv,
                                                const at::Tensor& query_scale,
                                                const at::Tensor& key_scale,
                                                const at::Tensor& cos,
                                                const at::Tensor& sin,
                                                double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({qkv, query_scale, key_scale, cos, sin});
    context->saved_data["eps"] = eps;
    auto [q, k, v] = call_forward(qkv, query_scale, key_scale, cos, sin, eps);
    return {q, k, v};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto& qkv = saved[0];
    const bool want_scales = context->needs_input_grad(1) || context->needs_input_grad(2);
    for (auto& grad : grads) grad = grad.contiguous();
    auto [grad_qkv, grad_scales] = call_backward(grads[0],
                                                 grads[1],
                                                 grads[2],
                                                 qkv,
                                                 saved[1],
                                                 saved[2],
                                                 saved[3],
                                                 saved[4],
                                                 context->saved_data["eps"].toDouble(),
                                                 want_scales);
    const at::Tensor none;
    return {grad_qkv,
            want_scales ? grad_scales[0] : none,
            want_scales ? grad_scales[1] : none,
            none,
            none,
            none};
  }
};

QkvTuple forward_autograd(const at::Tensor& qkv,
                          const at::Tensor& query_scale,
                          const at::Tensor& key_scale,
                          const at::Tensor& cos,
                          const at::Tensor& sin,
                          double eps) {
  auto out = QkNormRope::apply(qkv, query_scale, key_scale, cos, sin, eps);
  return {out[0], out[1], out[2]};
}

QkvTuple forward_meta(const at::Tensor& qkv,
                      const at::Tensor& query_scale,
                      const at::Tensor&,
                      const at::Tensor&,
                      const at::Tensor&,
                      double) {
  const int64_t head = query_scale.size(0);
  const auto result = [&] {
    return at::empty({qkv.size(0), qkv.size(1), qkv.size(2) / (3 * head), head}, qkv.options());
  };
  return {result(), result(), result()};
}

Grads backward_meta(const at::Tensor&,
                    const at::Tensor&,
                    const at::Tensor&,
                    const at::Tensor& qkv,
                    const at::Tensor& query_scale,
                    const at::Tensor&,
                    const at::Tensor&,
                    const at::Tensor&,
                    double,
                    bool want_scales) {
  return {at::empty(qkv.sizes(), qkv.options()),
          want_scales ? at::empty({2, query_scale.size(0)}, query_scale.options()) : at::Tensor()};
}

TORCH_LIBRARY_FRAGMENT(flux, library) {
  library.def(
      "qk_norm_rope(Tensor qkv, Tensor query_scale, Tensor key_scale, Tensor cos, Tensor sin, "
      "float eps) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor qkv, Tensor "
      "query_scale, Tensor key_scale, "
      "Tensor cos, Tensor sin, float eps, bool want_scales) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(flux, CPU, library) {
  library.impl("qk_norm_rope", kernel::qk_norm_rope_cpu);
  library.impl("qk_norm_rope_backward", kernel::qk_norm_rope_backward_cpu);
}
TORCH_LIBRARY_IMPL(flux, Meta, library) {
  library.impl("qk_norm_rope", forward_meta);
  library.impl("qk_norm_rope_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(flux, Autograd, library) { library.impl("qk_norm_rope", forward_autograd); }

void require(bool holds, std::string_view what, const at::Tensor& tensor, const at::Tensor& qkv) {
  if (holds) return;
  throw std::invalid_argument(fmt::format("qk_norm_rope: {} {} {} does not fit qkv {} {}",
                                          what,
                                          shape_text(tensor),
                                          c10::toString(tensor.scalar_type()),
                                          shape_text(qkv),
                                          c10::toString(qkv.scalar_type())));
}

}  // namespace

Qkv qk_norm_rope(const at::Tensor& qkv,
                 const at::Tensor& query_scale,
                 const at::Tensor& key_scale,
                 const at::Tensor& rope_cos,
                 const at::Tensor& rope_sin,
                 double eps) {
  const auto type = qkv.scalar_type();
  require(qkv.dim() == 3 && (type == at::kFloat || type == at::kBFloat16), "qkv", qkv, qkv);
  for (const auto& [name, scale] :
       {std::pair{"query_scale", query_scale}, {"key_scale", key_scale}}) {
    const int64_t head = scale.numel();
    require(scale.dim() == 1 && head > 0 && head % 2 == 0 && qkv.size(2) % (3 * head) == 0 &&
                head == query_scale.numel() &&
                (scale.scalar_type() == at::kFloat || scale.scalar_type() == type),
            name,
            scale,
            qkv);
  }
  for (const auto& [name, table] : {std::pair{"rope_cos", rope_cos}, {"rope_sin", rope_sin}})
    require(table.dim() == 3 && (table.size(0) == 1 || table.size(0) == qkv.size(0)) &&
                table.size(1) == qkv.size(1) && 2 * table.size(2) == query_scale.numel() &&
                table.scalar_type() == at::kFloat,
            name,
            table,
            qkv);
  const auto rows = qkv.stride(2) == 1 ? qkv : qkv.contiguous();
  auto [q, k, v] = call_forward(rows,
                                query_scale.to(at::kFloat).contiguous(),
                                key_scale.to(at::kFloat).contiguous(),
                                rope_cos.contiguous(),
                                rope_sin.contiguous(),
                                eps);
  return {q, k, v};
}

}  // namespace flux
