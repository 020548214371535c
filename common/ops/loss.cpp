// common/ops/loss.cpp - checks, autograd and the CPU faces of flux::loss.
#include "common/ops/loss.h"

#include <ATen/ops/empty.h>
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

void loss_cpu(const at::Tensor& prediction,
              const at::Tensor& target,
              const MaybeTensor& mask,
              const at::Tensor& c,
              int64_t type,
              int64_t group,
              const at::Tensor& sums) {
  kernel::for_ranges(
      prediction,
      kernel::rows_shape(prediction, group).num_groups(),
      1,
      [&]<class T>(T, int64_t first, int64_t last) {
        kernel::loss_cpu(
            kernel::loss_args<T>(prediction, target, mask, c, type, group, sums), first, last);
      });
}

void loss_backward_cpu(const at::Tensor& grad,
                       const at::Tensor& prediction,
                       const at::Tensor& target,
                       const MaybeTensor& mask,
                       const at::Tensor& c,
                       int64_t type,
                       const at::Tensor& grad_prediction) {
  kernel::for_ranges(
      prediction,
      prediction.size(0) * prediction.size(1),
      kernel::kRowsPerThread,
      [&]<class T>(T, int64_t first, int64_t last) {
        kernel::loss_cpu(
            kernel::loss_backward_args<T>(grad, prediction, target, mask, c, type, grad_prediction),
            first,
            last);
      });
}

TORCH_LIBRARY_FRAGMENT(flux, library) {
  library.def(
      "loss(Tensor prediction, Tensor target, Tensor? mask, Tensor c, int type, int group, "
      "Tensor(a!) sums) -> ()");
  library.def(
      "loss_backward(Tensor grad, Tensor prediction, Tensor target, Tensor? mask, Tensor c, int "
      "type, Tensor(a!) grad_prediction) -> ()");
}
TORCH_LIBRARY_IMPL(flux, CPU, library) {
  library.impl("loss", loss_cpu);
  library.impl("loss_backward", loss_backward_cpu);
}
TORCH_LIBRARY_IMPL(flux, Meta, library) {
  library.impl("loss", no_kernel<decltype(loss_cpu)>());
  library.impl("loss_backward", no_kernel<decltype(loss_backward_cpu)>());
}

/// Rows whose sum has one owner: fixed, so that results do not depend on the number of threads.
constexpr int64_t kGroup = 16;

struct LossSums : torch::autograd::Function<LossSums> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& prediction,
                            const at::Tensor& target,
                            const at::Tensor& c,
                            const MaybeTensor& mask,
                            int64_t type) {
    static const auto op = find_op<decltype(loss_cpu)>("flux::loss");
    at::AutoDispatchBelowADInplaceOrView below;
    const int64_t groups = kernel::rows_shape(prediction, kGroup).groups_per_sample();
    at::Tensor sums;
    {
      const MemoryScope scope(MemoryCause::kKernelScratch);
      sums = at::empty({prediction.size(0), groups}, prediction.options().dtype(at::kFloat));
    }
    op.call(prediction, target, mask, c, type, kGroup, sums);
    context->save_for_backward({prediction, target, c, mask.value_or(at::Tensor())});
    context->saved_data["type"] = type;
    return sums.sum(1);
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = find_op<decltype(loss_backward_cpu)>("flux::loss_backward");
    const auto saved = context->get_saved_variables();
    const at::Tensor &prediction = saved[0], &mask = saved[3];
    const auto grad_prediction = at::empty(prediction.sizes(), prediction.options());
    op.call(grads[0].contiguous(),
            prediction,
            saved[1],
            mask.defined() ? MaybeTensor(mask) : std::nullopt,
            saved[2],
            context->saved_data["type"].toInt(),
            grad_prediction);
    return {grad_prediction, {}, {}, {}, {}};
  }
};

}  // namespace

at::Tensor loss_sums(LossType type,
                     const at::Tensor& prediction,
                     const at::Tensor& target,
                     const at::Tensor& c,
                     const std::optional<at::Tensor>& mask) {
  const auto fits = [&](const at::Tensor& x) {
    return x.sizes() == prediction.sizes() && x.scalar_type() == at::kFloat;
  };
  const auto dtype = prediction.scalar_type();
  if (prediction.dim() != 3 || (dtype != at::kFloat && dtype != at::kBFloat16) || !fits(target) ||
      (mask && !fits(*mask)) || c.dim() != 1 || c.size(0) != prediction.size(0) ||
      c.scalar_type() != at::kFloat)
    throw std::invalid_argument(
        fmt::format("loss_sums: prediction {} {}, target {}, c {}, mask {}: not [B, N, width], the "
                    "same, [B] and as the first, the last three in float32",
                    shape_text(prediction),
                    c10::toString(dtype),
                    shape_text(target),
                    shape_text(c),
                    mask ? shape_text(*mask) : "none"));
  return LossSums::apply(dense_rows(prediction),
                         dense_rows(target),
                         c.contiguous(),
                         mask ? MaybeTensor(dense_rows(*mask)) : std::nullopt,
                         static_cast<int64_t>(type));
}

}  // namespace flux
