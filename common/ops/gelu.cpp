// common/ops/gelu.cpp - checks, autograd and the CPU faces of flux::gelu.
#include "common/ops/gelu.h"

#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <stdexcept>

#include "common/ops/op.h"
#include "common/ops/rows_cpu.h"
#include "common/ops/rows_parallel.h"
#include "common/tensor/tensor.h"

namespace flux {
namespace {

using kernel::dense_rows;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void gelu_cpu(const at::Tensor& x, const at::Tensor& out) {
  kernel::for_ranges(x,
                     x.size(0) * x.size(1),
                     kernel::kRowsPerThread,
                     [&]<class T>(T, int64_t first, int64_t last) {
                       kernel::gelu_cpu(kernel::gelu_args<T>(x, out), first, last);
                     });
}

void gelu_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grad_x) {
  kernel::for_ranges(x,
                     x.size(0) * x.size(1),
                     kernel::kRowsPerThread,
                     [&]<class T>(T, int64_t first, int64_t last) {
                       kernel::gelu_cpu(kernel::gelu_args<T>(grad, x, grad_x), first, last);
                     });
}

TORCH_LIBRARY_FRAGMENT(flux, library) {
  library.def("gelu(Tensor x, Tensor(a!) out) -> ()");
  library.def("gelu_backward(Tensor grad, Tensor x, Tensor(a!) grad_x) -> ()");
}
TORCH_LIBRARY_IMPL(flux, CPU, library) {
  library.impl("gelu", gelu_cpu);
  library.impl("gelu_backward", gelu_backward_cpu);
}
TORCH_LIBRARY_IMPL(flux, Meta, library) {
  library.impl("gelu", no_kernel<decltype(gelu_cpu)>());
  library.impl("gelu_backward", no_kernel<decltype(gelu_backward_cpu)>());
}

void run_gelu(const at::Tensor& x, const at::Tensor& out) {
  static const auto op = find_op<decltype(gelu_cpu)>("flux::gelu");
  op.call(x, out);
}

at::Tensor gelu_gradient(const at::Tensor& grad, const at::Tensor& x) {
  static const auto op = find_op<decltype(gelu_backward_cpu)>("flux::gelu_backward");
  const auto grad_x = at::empty(x.sizes(), x.options());
  op.call(grad, x, grad_x);
  return grad_x;
}

struct Gelu : torch::autograd::Function<Gelu> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto out = at::empty(x.sizes(), x.options());
    run_gelu(x, out);
    context->save_for_backward({x});
    return out;
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    return {gelu_gradient(dense_rows(grads[0]), context->get_saved_variables()[0])};
  }
};

struct ConcatGelu : torch::autograd::Function<ConcatGelu> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& left, const at::Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView below;
    const int64_t width = left.size(2);
    const auto out = at::empty({x.size(0), x.size(1), width + x.size(2)}, x.options());
    out.narrow(2, 0, width).copy_(left);
    run_gelu(x, out.narrow(2, width, x.size(2)));
    context->save_for_backward({x});
    context->saved_data["width"] = width;
    return out;
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto x = context->get_saved_variables()[0];
    const int64_t width = context->saved_data["width"].toInt();
    const auto grad = dense_rows(grads[0]);
    variable_list out(2);
    if (context->needs_input_grad(0)) out[0] = grad.narrow(2, 0, width);
    if (context->needs_input_grad(1)) out[1] = gelu_gradient(grad.narrow(2, width, x.size(2)), x);
    return out;
  }
};

void check(const at::Tensor& x) {
  if (x.dim() == 3 && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16)) return;
  throw std::invalid_argument(
      fmt::format("gelu: x {} {} is not [B, N, width] in float32 or bfloat16",
                  shape_text(x),
                  c10::toString(x.scalar_type())));
}

}  // namespace

at::Tensor gelu_tanh(const at::Tensor& x) {
  check(x);
  return Gelu::apply(dense_rows(x));
}

at::Tensor concat_gelu(const at::Tensor& left, const at::Tensor& x) {
  check(x);
  if (left.dim() != 3 || left.scalar_type() != x.scalar_type() || left.size(0) != x.size(0) ||
      left.size(1) != x.size(1))
    throw std::invalid_argument(fmt::format("concat_gelu: left {} {} does not fit x {} {}",
                                            shape_text(left),
                                            c10::toString(left.scalar_type()),
                                            shape_text(x),
                                            c10::toString(x.scalar_type())));
  return ConcatGelu::apply(left, dense_rows(x));
}

}  // namespace flux
