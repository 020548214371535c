#include "common/ops/linear.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <stdexcept>

#include "common/tensor/tensor.h"

namespace flux {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor transposed_product(const at::Tensor& a, const at::Tensor& b) {
  // a^T b with a made contiguous first: measured 1.1 to 1.8 times faster on the CPU than handing
  // over the transposed view
  return at::mm(a.t().contiguous(), b);
}

// One node for base and adapter: x is kept once, and only what is asked for is computed.
struct LinearFunction : torch::autograd::Function<LinearFunction> {
  enum Argument : size_t { kX, kWeight, kBias, kDown, kUp, kScale, kNumArguments };

  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x,
                            const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& down,
                            const std::optional<at::Tensor>& up,
                            double scale) {
    auto y = bias ? at::addmm(*bias, x, weight.t()) : at::mm(x, weight.t());
    at::Tensor down_product, down_cast, up_cast;
    if (down) {
      down_cast = down->to(x.scalar_type());
      up_cast = up->to(x.scalar_type());
      down_product = at::mm(x, down_cast.t());
      y.addmm_(down_product, up_cast.t(), 1, scale);
    }
    const bool x_needed = weight.requires_grad() || (down && down->requires_grad());
    context->save_for_backward(
        {x_needed ? x : at::Tensor(), weight, down_product, down_cast, up_cast});
    context->saved_data["scale"] = scale;
    context->saved_data["has_bias"] = bias.has_value();
    context->saved_data["low_rank_type"] = down ? down->scalar_type() : at::kFloat;
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1], &down_product = saved[2], &down = saved[3],
               &up = saved[4];
    const auto low_rank_type = context->saved_data["low_rank_type"].toScalarType();
    const double scale = context->saved_data["scale"].toDouble();
    const auto grad = grads[0].contiguous();
    // edges are counted without the arguments that are not there
    const size_t missing = context->saved_data["has_bias"].toBool() ? 0 : 1;
    const auto wanted = [&](Argument argument) {
      return context->needs_input_grad(argument > kBias ? argument - missing : argument);
    };
    variable_list out(kNumArguments);
    if (wanted(kX)) out[kX] = at::mm(grad, weight);
    if (wanted(kWeight)) out[kWeight] = transposed_product(grad, x);
    if (missing == 0 && wanted(kBias)) out[kBias] = grad.sum(0);
    if (down.defined()) {
      const auto up_product = at::mm(grad, up).mul_(scale);  // [n, rank]
      if (out[kX].defined()) out[kX].addmm_(up_product, down);
      if (wanted(kDown)) out[kDown] = transposed_product(up_product, x).to(low_rank_type);
      if (wanted(kUp))
        out[kUp] = transposed_product(down_product, grad).t().to(low_rank_type).mul_(scale);
    }
    return out;
  }
};

void require(bool holds,
             std::string_view what,
             const at::Tensor& tensor,
             const at::Tensor& weight) {
  if (holds) return;
  throw std::invalid_argument(fmt::format("linear: {} {} {} does not fit weight {} {}",
                                          what,
                                          shape_text(tensor),
                                          c10::toString(tensor.scalar_type()),
                                          shape_text(weight),
                                          c10::toString(weight.scalar_type())));
}

}  // namespace

at::Tensor linear(const Linear& layer, const at::Tensor& x) {
  const auto& w = layer.weight;
  const auto &down = layer.lora.down, &up = layer.lora.up;
  require(
      w.dim() == 2 && x.dim() >= 1 && x.size(-1) == w.size(1) && x.scalar_type() == w.scalar_type(),
      "x",
      x,
      w);
  if (layer.bias.defined())
    require(layer.bias.dim() == 1 && layer.bias.size(0) == w.size(0), "bias", layer.bias, w);
  if (down.defined()) {
    require(down.dim() == 2 && down.size(1) == w.size(1), "down", down, w);
    require(up.defined() && up.dim() == 2 && up.size(0) == w.size(0) && up.size(1) == down.size(0),
            "up",
            up,
            w);
  }
  auto shape = x.sizes().vec();
  shape.back() = w.size(0);
  const auto rows = x.reshape({-1, x.size(-1)});
  const auto given = [](const at::Tensor& t) {
    return t.defined() ? std::optional(t) : std::nullopt;
  };
  return LinearFunction::apply(rows, w, given(layer.bias), given(down), given(up), layer.lora.scale)
      .view(shape);
}

}  // namespace flux
