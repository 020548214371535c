// common/ops/modulate.cpp - checks, autograd and the CPU faces of flux::modulate and flux::gated.
#include "common/ops/modulate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <stdexcept>

#include "common/ops/op.h"
#include "common/ops/rows_cpu.h"
#include "common/ops/rows_parallel.h"
#include "common/tensor/memory.h"
#include "common/tensor/tensor.h"

namespace flux {
namespace {

using kernel::dense_rows;
using kernel::MaybeTensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void modulate_cpu(const at::Tensor& x,
                  const at::Tensor& shift,
                  const at::Tensor& scale,
                  double eps,
                  const at::Tensor& out,
                  const at::Tensor& stats) {
  kernel::for_ranges(x,
                     x.size(0) * x.size(1),
                     kernel::kRowsPerThread,
                     [&]<class T>(T, int64_t first, int64_t last) {
                       kernel::modulate_cpu(
                           kernel::modulate_args<T>(x, shift, scale, eps, out, stats), first, last);
                     });
}

void modulate_backward_cpu(const at::Tensor& grad,
                           const at::Tensor& x,
                           const at::Tensor& scale,
                           const at::Tensor& stats,
                           int64_t group,
                           const MaybeTensor& grad_x,
                           const MaybeTensor& sums) {
  kernel::for_ranges(
      x,
      kernel::rows_shape(x, group).num_groups(),
      1,
      [&]<class T>(T, int64_t first, int64_t last) {
        kernel::modulate_cpu(
            kernel::modulate_args<T>(grad, x, scale, stats, group, grad_x, sums), first, last);
      });
}

void gated_cpu(const at::Tensor& x,
               const at::Tensor& gate,
               const at::Tensor& update,
               const at::Tensor& out) {
  kernel::for_ranges(x,
                     x.size(0) * x.size(1),
                     kernel::kRowsPerThread,
                     [&]<class T>(T, int64_t first, int64_t last) {
                       kernel::gated_cpu(kernel::gated_args<T>(x, gate, update, out), first, last);
                     });
}

void gated_backward_cpu(const at::Tensor& grad,
                        const at::Tensor& gate,
                        const MaybeTensor& update,
                        int64_t group,
                        const MaybeTensor& grad_update,
                        const MaybeTensor& sums) {
  kernel::for_ranges(
      grad,
      kernel::rows_shape(grad, group).num_groups(),
      1,
      [&]<class T>(T, int64_t first, int64_t last) {
        kernel::gated_cpu(
            kernel::gated_args<T>(grad, gate, update, group, grad_update, sums), first, last);
      });
}

void add_groups_cpu(const at::Tensor& sums, const at::Tensor& out) {
  kernel::for_ranges(out, sums.size(0), 1, [&]<class T>(T, int64_t first, int64_t last) {
    kernel::add_groups_cpu(kernel::group_sums_args<T>(sums, out), first, last);
  });
}

TORCH_LIBRARY_FRAGMENT(flux, library) {
  library.def(
      "modulate(Tensor x, Tensor shift, Tensor scale, float eps, Tensor(a!) out, Tensor(b!) stats) "
      "-> ()");
  library.def(
      "modulate_backward(Tensor grad, Tensor x, Tensor scale, Tensor stats, int group, "
      "Tensor(a!)? grad_x, Tensor(b!)? sums) -> ()");
  library.def("gated(Tensor x, Tensor gate, Tensor update, Tensor(a!) out) -> ()");
  library.def(
      "gated_backward(Tensor grad, Tensor gate, Tensor? update, int group, Tensor(a!)? "
      "grad_update, Tensor(b!)? sums) -> ()");
  library.def("add_groups(Tensor sums, Tensor(a!) out) -> ()");
}
TORCH_LIBRARY_IMPL(flux, CPU, library) {
  library.impl("modulate", modulate_cpu);
  library.impl("modulate_backward", modulate_backward_cpu);
  library.impl("gated", gated_cpu);
  library.impl("gated_backward", gated_backward_cpu);
  library.impl("add_groups", add_groups_cpu);
}
TORCH_LIBRARY_IMPL(flux, Meta, library) {
  library.impl("modulate", no_kernel<decltype(modulate_cpu)>());
  library.impl("modulate_backward", no_kernel<decltype(modulate_backward_cpu)>());
  library.impl("gated", no_kernel<decltype(gated_cpu)>());
  library.impl("gated_backward", no_kernel<decltype(gated_backward_cpu)>());
  library.impl("add_groups", no_kernel<decltype(add_groups_cpu)>());
}

/// Tokens whose sums have one owner: fixed, so that results do not depend on the number of threads.
int64_t tokens_per_group(const at::Tensor& x) { return kernel_device(x) == c10::kCUDA ? 16 : 64; }

/// The memory of the groups' sums [B, groups, width], float32.
at::Tensor group_sums(const at::Tensor& x, int64_t group, int64_t width) {
  const MemoryScope scope(MemoryCause::kKernelScratch);
  return at::empty({x.size(0), kernel::rows_shape(x, group).groups_per_sample(), width},
                   x.options().dtype(at::kFloat));
}

/// [B, width] in the dtype of `like`.
at::Tensor added(const at::Tensor& sums, const at::Tensor& like) {
  static const auto op = find_op<decltype(add_groups_cpu)>("flux::add_groups");
  auto out = at::empty({sums.size(0), sums.size(2)}, like.options());
  op.call(sums, out);
  return out;
}

MaybeTensor given(const at::Tensor& tensor) {
  return tensor.defined() ? MaybeTensor(tensor) : std::nullopt;
}

struct Modulate : torch::autograd::Function<Modulate> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x,
                            const at::Tensor& shift,
                            const at::Tensor& scale,
                            double eps) {
    static const auto op = find_op<decltype(modulate_cpu)>("flux::modulate");
    at::AutoDispatchBelowADInplaceOrView below;
    const auto out = at::empty(x.sizes(), x.options());
    const auto stats = at::empty({x.size(0), x.size(1), 2}, x.options().dtype(at::kFloat));
    op.call(x, shift, scale, eps, out, stats);
    context->save_for_backward({x, scale, stats});
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = find_op<decltype(modulate_backward_cpu)>("flux::modulate_backward");
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &scale = saved[1], &stats = saved[2];
    const auto grad = dense_rows(grads[0]);
    const int64_t group = tokens_per_group(x), width = x.size(2);
    const bool want_sums = context->needs_input_grad(1) || context->needs_input_grad(2);
    const auto sums = want_sums ? group_sums(x, group, 2 * width) : at::Tensor();
    const auto grad_x =
        context->needs_input_grad(0) ? at::empty(x.sizes(), x.options()) : at::Tensor();
    op.call(grad, x, scale, stats, group, given(grad_x), given(sums));
    if (!want_sums) return {grad_x, at::Tensor(), at::Tensor(), at::Tensor()};
    const auto both = added(sums, scale);
    return {grad_x,
            both.narrow(1, 0, width).unsqueeze(1),
            both.narrow(1, width, width).unsqueeze(1),
            at::Tensor()};
  }
};

struct GatedResidual : torch::autograd::Function<GatedResidual> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x,
                            const at::Tensor& gate,
                            const at::Tensor& update) {
    static const auto op = find_op<decltype(gated_cpu)>("flux::gated");
    at::AutoDispatchBelowADInplaceOrView below;
    const auto out = at::empty(x.sizes(), x.options());
    op.call(x, gate, update, out);
    context->save_for_backward({gate, gate.requires_grad() ? update : at::Tensor()});
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = find_op<decltype(gated_backward_cpu)>("flux::gated_backward");
    const auto saved = context->get_saved_variables();
    const auto &gate = saved[0], &update = saved[1];
    const auto grad = dense_rows(grads[0]);
    const int64_t group = tokens_per_group(grad);
    const bool want_gate = context->needs_input_grad(1);
    const auto sums = want_gate ? group_sums(grad, group, grad.size(2)) : at::Tensor();
    const auto grad_update =
        context->needs_input_grad(2) ? at::empty(grad.sizes(), grad.options()) : at::Tensor();
    if (want_gate || grad_update.defined())
      op.call(grad, gate, given(update), group, given(grad_update), given(sums));
    return {context->needs_input_grad(0) ? grads[0] : at::Tensor(),
            want_gate ? added(sums, gate).unsqueeze(1) : at::Tensor(),
            grad_update};
  }
};

void check(std::string_view op,
           const at::Tensor& x,
           std::initializer_list<std::pair<const char*, at::Tensor>> vectors) {
  const auto type = x.scalar_type();
  if (x.dim() != 3 || (type != at::kFloat && type != at::kBFloat16))
    throw std::invalid_argument(fmt::format("{}: x {} {} is not [B, N, H] in float32 or bfloat16",
                                            op,
                                            shape_text(x),
                                            c10::toString(type)));
  for (const auto& [name, vector] : vectors) {
    const bool whole = std::string_view(name) == "update";
    if (vector.scalar_type() != type ||
        !vector.sizes().equals({x.size(0), whole ? x.size(1) : 1, x.size(2)}))
      throw std::invalid_argument(fmt::format("{}: {} {} {} does not fit x {} {}",
                                              op,
                                              name,
                                              shape_text(vector),
                                              c10::toString(vector.scalar_type()),
                                              shape_text(x),
                                              c10::toString(type)));
  }
}

}  // namespace

at::Tensor modulate(const at::Tensor& x,
                    const at::Tensor& shift,
                    const at::Tensor& scale,
                    double eps) {
  check("modulate", x, {{"shift", shift}, {"scale", scale}});
  return Modulate::apply(dense_rows(x), dense_rows(shift), dense_rows(scale), eps);
}

at::Tensor layer_norm(const at::Tensor& x, double eps) {
  const auto rows = x.reshape({1, -1, x.size(-1)});
  const auto zero = at::zeros({1, 1, x.size(-1)}, x.options());
  return modulate(rows, zero, zero, eps).view(x.sizes());
}

at::Tensor gated_residual(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& update) {
  check("gated_residual", x, {{"gate", gate}, {"update", update}});
  return GatedResidual::apply(dense_rows(x), dense_rows(gate), dense_rows(update));
}

}  // namespace flux
