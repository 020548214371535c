#include "common/ops/adapter.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>

#include "common/ops/product.h"
#include "common/tensor/memory.h"

namespace flux {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Elements of the float32 copies that work goes through a part at a time.
constexpr int64_t kPartElements = int64_t{1} << 22;

at::Tensor product(const Product& p) {
  auto out = at::empty({p.a.size(0), p.b.size(1)}, p.a.options());
  multiply(p, out);
  return out;
}

at::Tensor scratch(at::IntArrayRef shape, const at::Tensor& like) {
  const MemoryScope scope(MemoryCause::kKernelScratch);
  return at::empty(shape, like.options().dtype(at::kFloat));
}

std::optional<at::Tensor> given(const at::Tensor& t) {
  return t.defined() ? std::optional(t) : std::nullopt;
}

/// [n * p, q] as [n * q, p], where q and p change their places in each of n.
at::Tensor swapped(const at::Tensor& t, int64_t n) {
  const int64_t q = t.size(1), p = t.size(0) / std::max<int64_t>(n, 1);
  return t.view({n, p, q}).transpose(1, 2).contiguous().view({n * q, p});
}

struct KroneckerFunction : torch::autograd::Function<KroneckerFunction> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& y,
                            const at::Tensor& x,
                            const at::Tensor& mix,
                            const at::Tensor& down,
                            const std::optional<at::Tensor>& up,
                            double scale) {
    const auto type = x.scalar_type();
    const at::Tensor mix_cast = mix.to(type), down_cast = down.to(type),
                     up_cast = up ? up->to(type) : at::Tensor();
    const int64_t n = x.size(0), c = mix.size(1);
    const at::Tensor pieces = x.reshape({n * c, x.size(1) / c});
    const at::Tensor inner =
        swapped(product({.a = pieces, .b = down_cast.t()}), n);  // [n * rank, C]
    // [n * A, rank]
    at::Tensor mixed = swapped(product({.a = inner, .b = mix_cast.t(), .scale = scale}), n);
    y.add_((up ? product({.a = mixed, .b = up_cast.t()}) : mixed).view(y.sizes()));
    context->mark_dirty({y});
    context->save_for_backward({x, inner, up ? mixed : at::Tensor(), mix_cast, down_cast, up_cast});
    context->saved_data["scale"] = scale;
    context->saved_data["type"] = down.scalar_type();
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &inner = saved[1], &mixed = saved[2], &mix = saved[3],
               &down = saved[4], &up = saved[5];
    const double scale = context->saved_data["scale"].toDouble();
    const auto type = context->saved_data["type"].toScalarType();
    const int64_t n = x.size(0), a = mix.size(0), c = mix.size(1);
    const at::Tensor grad = grads[0].contiguous().view({n * a, grads[0].size(1) / a});
    variable_list out(6);
    out[0] = grads[0];
    if (up.defined()) out[4] = product({.a = grad.t(), .b = mixed}).to(type);
    at::Tensor of_mixed = swapped(up.defined() ? product({.a = grad, .b = up}) : grad, n);
    out[2] = product({.a = of_mixed.t(), .b = inner, .scale = scale}).to(type);
    const at::Tensor of_inner =
        swapped(product({.a = of_mixed, .b = mix, .scale = scale}), n);  // [n * C, rank]
    of_mixed.reset();
    out[3] = product({.a = of_inner.t(), .b = x.reshape({n * c, x.size(1) / c})}).to(type);
    if (context->needs_input_grad(1)) out[1] = product({.a = of_inner, .b = down}).view(x.sizes());
    return out;
  }
};

/// Calls `work(first, count)` for the parts of `rows` rows of `columns` elements.
template <class Work>
void in_parts(int64_t rows, int64_t columns, const Work& work) {
  const int64_t most = std::max<int64_t>(kPartElements / std::max<int64_t>(columns, 1), 1);
  for (int64_t first = 0; first < rows; first += most) work(first, std::min(most, rows - first));
}

struct ScaleRowsFunction : torch::autograd::Function<ScaleRowsFunction> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& y,
                            const std::optional<at::Tensor>& bias,
                            const at::Tensor& magnitude,
                            const at::Tensor& norms) {
    const at::Tensor factor = magnitude.view({-1}) / norms;
    // y * 1 - 0 * bias has the bits of y
    at::Tensor shift;
    if (bias) shift = (factor - 1).mul_(bias->to(at::kFloat));
    at::Tensor out = at::empty_like(y), buffer;
    in_parts(y.size(0), y.size(1), [&](int64_t first, int64_t count) {
      if (!buffer.defined()) buffer = scratch({count, y.size(1)}, y);
      const at::Tensor part = buffer.narrow(0, 0, count).copy_(y.narrow(0, first, count));
      part.mul_(factor);
      if (bias) part.sub_(shift);
      out.narrow(0, first, count).copy_(part);
    });
    context->save_for_backward({y, bias.value_or(at::Tensor()), norms, factor});
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &y = saved[0], &bias = saved[1], &norms = saved[2], &factor = saved[3];
    const at::Tensor& grad = grads[0];
    const at::Tensor of_y = at::empty_like(y), of_magnitude = at::zeros_like(norms);
    const bool bias_needed = bias.defined() && context->needs_input_grad(1);
    at::Tensor wide_bias, of_bias, left, right;
    if (bias.defined()) wide_bias = bias.to(at::kFloat);
    if (bias_needed) of_bias = at::zeros_like(norms);
    in_parts(y.size(0), y.size(1), [&](int64_t first, int64_t count) {
      if (!left.defined()) {
        left = scratch({count, y.size(1)}, y);
        right = scratch({count, y.size(1)}, y);
      }
      const at::Tensor of_part = left.narrow(0, 0, count).copy_(grad.narrow(0, first, count));
      const at::Tensor part = right.narrow(0, 0, count).copy_(y.narrow(0, first, count));
      if (bias.defined()) part.sub_(wide_bias);
      of_magnitude.add_(part.mul_(of_part).sum(0));
      if (bias_needed) of_bias.add_(of_part.sum(0));
      of_y.narrow(0, first, count).copy_(of_part.mul_(factor));
    });
    variable_list out(4);
    out[0] = of_y;
    if (bias_needed) out[1] = of_bias.mul_(1 - factor).to(bias.scalar_type());
    out[2] = of_magnitude.div_(norms).view({-1, 1});
    return out;
  }
};

}  // namespace

at::Tensor add_kronecker(const at::Tensor& y, const at::Tensor& x, const LowRank& adapter) {
  return KroneckerFunction::apply(
      y, x, adapter.mix, adapter.down, given(adapter.up), adapter.scale);
}

int64_t delta_rows(int64_t in, const LowRank& adapter) {
  if (adapter.mix.defined()) return (adapter.up.defined() ? adapter.up : adapter.down).size(0);
  return std::max<int64_t>(kPartElements / std::max<int64_t>(in, 1), 1);
}

void add_delta(const at::Tensor& out, int64_t first, const LowRank& adapter) {
  const at::NoGradGuard no_grad;
  const MemoryScope scope(MemoryCause::kKernelScratch);
  const at::Tensor down = adapter.down.detach().to(at::kFloat);
  const at::Tensor up = adapter.up.defined() ? adapter.up.detach().to(at::kFloat) : at::Tensor();
  if (!adapter.mix.defined()) {
    out.add_(product({.a = up.narrow(0, first, out.size(0)), .b = down, .scale = adapter.scale}));
    return;
  }
  const at::Tensor mix = adapter.mix.detach().to(at::kFloat);
  const at::Tensor inner = up.defined() ? product({.a = up, .b = down}) : down;  // [B, D]
  const int64_t b = inner.size(0), c = mix.size(1), d = inner.size(1);
  for (int64_t row = 0; row < out.size(0); row += b)
    out.narrow(0, row, b).view({b, c, d}).addcmul_(
        mix.select(0, (first + row) / b).view({1, c, 1}), inner.view({b, 1, d}), adapter.scale);
}

at::Tensor scale_rows(const at::Tensor& y,
                      const at::Tensor& bias,
                      const at::Tensor& magnitude,
                      const at::Tensor& norms) {
  return ScaleRowsFunction::apply(y, given(bias), magnitude, norms);
}

}  // namespace flux
