#include "common/ops/linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "common/core/rng.h"
#include "common/ops/adapter.h"
#include "common/ops/op.h"
#include "common/ops/product.h"
#include "common/quant/scratch.h"
#include "common/tensor/memory.h"
#include "common/tensor/tensor.h"

namespace flux {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor product(const Product& p) {
  auto out = at::empty({p.a.size(0), p.b.size(1)}, p.a.options());
  multiply(p, out);
  return out;
}

/// Calls `use` with the weight as a matrix of the dtype of `x`.
template <class Use>
auto with_weight(const at::Tensor& weight,
                 const QuantizedWeight& quantized,
                 const at::Tensor& x,
                 const Use& use) {
  if (!quantized.defined()) return use(weight);
  const PlainWeight plain(quantized, x.scalar_type());
  return use(*plain);
}

/// What of x down^T [n, rank] is zero in one call. Kept by value: the backward comes when another pass may be set.
struct Dropped {
  double values = 0, ranks = 0;
  uint64_t seed = 0, stream = 0, module = 0;
  int64_t rows_of_sample = 1;

  bool any() const { return values > 0 || ranks > 0; }
  double growth() const { return 1 / ((1 - values) * (1 - ranks)); }

  /// Zeros elements of `products`, the same ones at every call. On a GPU through a mask that the CPU makes.
  void zero(const at::Tensor& products) const {
    if (!any()) return;
    if (products.is_cpu()) {
      if (products.scalar_type() == at::kFloat)
        zero_in(products.mutable_data_ptr<float>(), products);
      else
        zero_in(products.mutable_data_ptr<at::BFloat16>(), products);
      return;
    }
    if (kernel_device(products) == at::kCPU) return;  // a plan: there it takes no memory
    const MemoryScope scope(MemoryCause::kKernelScratch);
    if (products.is_meta()) {
      at::empty_like(products);
      return;
    }
    const at::Tensor mask = at::ones(products.sizes(), at::kFloat);
    zero_in(mask.mutable_data_ptr<float>(), products);
    products.mul_(mask.to(products.options()));
  }

 private:
  /// Values first, then ranks, so that neither share changes what the other drops.
  template <class T>
  void zero_in(T* data, const at::Tensor& like) const {
    constexpr uint64_t kRanks = uint64_t{1} << 48;
    const int64_t rank = like.size(1);
    at::parallel_for(0, like.size(0), 64, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const RandomStream random(seed,
                                  Purpose::kAdapterDropout,
                                  stream + static_cast<uint64_t>(row / rows_of_sample),
                                  module);
        const auto is_below = [&](uint64_t i, double share) {
          return share > 0 && random.bits(i) < share * 0x1p32;
        };
        for (int64_t column = 0; column < rank; ++column) {
          const auto i = static_cast<uint64_t>(row % rows_of_sample * rank + column);
          if (is_below(i, values) || is_below(kRanks + static_cast<uint64_t>(column), ranks))
            data[row * rank + column] = T(0);
        }
      }
    });
  }
};

/// Whether the whole adapter is left out of this update.
bool is_dropped(const LowRank& adapter) {
  const AdapterDropout* dropout = adapter.dropout;
  if (!dropout || dropout->modules <= 0 || adapter.down.is_meta()) return false;
  constexpr uint64_t kModule = uint64_t{1} << 50;
  const RandomStream random(
      dropout->seed, Purpose::kAdapterDropout, dropout->pass << 20, adapter.module);
  return random.uniform(kModule) < dropout->modules;
}

// One node for base and adapter: x is kept once, and only what is asked for is computed. Of a
// quantised weight `weight` is the codes.
struct LinearFunction : torch::autograd::Function<LinearFunction> {
  enum Argument : size_t {
    kX,
    kWeight,
    kBias,
    kDown,
    kUp,
    kScale,
    kQuantized,
    kDropped,
    kNumArguments
  };

  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x,
                            const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& down,
                            const std::optional<at::Tensor>& up,
                            double scale,
                            const QuantizedWeight& quantized,
                            const Dropped& dropped) {
    scale *= dropped.growth();
    at::Tensor down_product, down_cast, up_cast;
    if (down) {
      down_cast = down->to(x.scalar_type());
      up_cast = up->to(x.scalar_type());
      down_product = product({.a = x, .b = down_cast.t(), .scale = scale});
      dropped.zero(down_product);
    }
    const auto y = with_weight(weight, quantized, x, [&](const at::Tensor& w) {
      return product({.a = x,
                      .b = w.t(),
                      .c = down_product,
                      .d = down ? up_cast.t() : at::Tensor(),
                      .bias = bias.value_or(at::Tensor())});
    });
    const bool x_needed = weight.requires_grad() || (down && down->requires_grad());
    context->save_for_backward(
        {x_needed ? x : at::Tensor(), weight, down_product, down_cast, up_cast, quantized.scales});
    context->saved_data["quant_format"] = static_cast<int64_t>(quantized.format);
    context->saved_data["scale"] = scale;
    if (dropped.any()) {
      context->saved_data["dropped_shares"] = std::vector<double>{dropped.values, dropped.ranks};
      context->saved_data["dropped_keys"] =
          std::vector<int64_t>{static_cast<int64_t>(dropped.seed),
                               static_cast<int64_t>(dropped.stream),
                               static_cast<int64_t>(dropped.module),
                               dropped.rows_of_sample};
    }
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
    QuantizedWeight quantized;
    if (saved[5].defined()) {
      const auto format = context->saved_data["quant_format"].toInt();
      quantized = {static_cast<QuantFormat>(format), weight, saved[5]};
    }
    // [n, rank]; `scale` is in both products of the adapter
    const auto up_product =
        down.defined() ? product({.a = grad, .b = up, .scale = scale}) : at::Tensor();
    if (const auto shares = context->saved_data.find("dropped_shares");
        down.defined() && shares != context->saved_data.end()) {
      const auto share = shares->second.toDoubleVector();
      const auto key = context->saved_data["dropped_keys"].toIntVector();
      Dropped{share[0],
              share[1],
              static_cast<uint64_t>(key[0]),
              static_cast<uint64_t>(key[1]),
              static_cast<uint64_t>(key[2]),
              key[3]}
          .zero(up_product);
    }
    if (wanted(kX))
      out[kX] = with_weight(weight, quantized, grad, [&](const at::Tensor& w) {
        return product({.a = grad, .b = w, .c = up_product, .d = down});
      });
    if (wanted(kWeight)) out[kWeight] = product({.a = grad.t(), .b = x});
    if (missing == 0 && wanted(kBias)) out[kBias] = grad.sum(0);
    if (!down.defined()) return out;
    if (wanted(kDown)) out[kDown] = product({.a = up_product.t(), .b = x}).to(low_rank_type);
    if (wanted(kUp))
      out[kUp] = at::empty(up.sizes(), up.options().dtype(low_rank_type))
                     .copy_(product({.a = down_product.t(), .b = grad}).t());
    return out;
  }
};

/// What must fit a layer: its sizes, and the dtype that its products have.
struct LayerSize {
  int64_t out, in;
  std::string text;  // for messages

  explicit LayerSize(const Linear& layer) {
    const auto &weight = layer.weight, &codes = layer.quantized.codes;
    if (weight.defined() == codes.defined())
      throw std::invalid_argument(weight.defined() ? "linear: both a weight and a quantised one"
                                                   : "linear: no weight");
    const auto& matrix = weight.defined() ? weight : codes;
    text = fmt::format("{} {}", shape_text(matrix), c10::toString(matrix.scalar_type()));
    if (matrix.dim() != 2)
      throw std::invalid_argument(fmt::format("linear: weight {} is no matrix", text));
    out = weight.defined() ? weight.size(0) : layer.quantized.out();
    in = weight.defined() ? weight.size(1) : layer.quantized.in();
  }

  void require(bool holds, std::string_view what, const at::Tensor& tensor) const {
    if (holds) return;
    throw std::invalid_argument(fmt::format("linear: {} {} {} does not fit weight {}",
                                            what,
                                            shape_text(tensor),
                                            c10::toString(tensor.scalar_type()),
                                            text));
  }

  void require_low_rank(const LowRank& adapter) const {
    const auto &down = adapter.down, &up = adapter.up;
    require(down.defined() && down.dim() == 2 && down.size(1) == in, "down", down);
    require(
        up.defined() && up.dim() == 2 && up.size(0) == out && up.size(1) == down.size(0), "up", up);
  }

  void require_kronecker(const LowRank& adapter) const {
    const auto &mix = adapter.mix, &down = adapter.down, &up = adapter.up;
    require(mix.dim() == 2, "mix", mix);
    require(down.defined() && down.dim() == 2 && mix.size(1) * down.size(1) == in, "down", down);
    const at::Tensor& last = up.defined() ? up : down;
    require(last.dim() == 2 && mix.size(0) * last.size(0) == out &&
                (!up.defined() || up.size(1) == down.size(0)),
            "up",
            last);
  }
};

at::Tensor with_own_adapter(const Linear& layer, const at::Tensor& x);

/// y + multiplier * (W' - W) x of each added adapter.
at::Tensor with_added(const Linear& layer, const at::Tensor& x) {
  if (at::GradMode::is_enabled())
    throw std::logic_error("linear: added adapters have no gradients");
  at::Tensor y = with_own_adapter(layer, x), base;
  for (const AddedAdapter& added : layer.added) {
    const Linear alone{layer.weight, layer.bias, added.lora, layer.quantized};
    const LowRank& lora = added.lora;
    if (lora.magnitude.defined()) {
      // the norms are those of the adapter as it is, so that the multiplier cannot be in its scale
      if (!base.defined())
        base = with_own_adapter({layer.weight, layer.bias, {}, layer.quantized}, x);
      y = y + (with_own_adapter(alone, x) - base) * added.multiplier;
      continue;
    }
    const LayerSize size(layer);
    const auto rows = x.reshape({-1, x.size(-1)});
    LowRank scaled = lora;
    scaled.scale *= added.multiplier;
    if (lora.mix.defined()) {
      size.require_kronecker(lora);
      y = add_kronecker(y.view({-1, size.out}), rows, scaled).view(y.sizes());
      continue;
    }
    size.require_low_rank(lora);
    const auto low =
        product({.a = rows, .b = lora.down.to(x.scalar_type()).t(), .scale = scaled.scale});
    y.add_(product({.a = low, .b = lora.up.to(x.scalar_type()).t()}).view(y.sizes()));
  }
  return y;
}

}  // namespace

at::Tensor linear(const Linear& layer, const at::Tensor& x) {
  return layer.added.empty() ? with_own_adapter(layer, x) : with_added(layer, x);
}

namespace {

at::Tensor with_own_adapter(const Linear& layer, const at::Tensor& x) {
  const auto& w = layer.weight;
  const auto &down = layer.lora.down, &up = layer.lora.up;
  const LayerSize size(layer);
  const auto type = x.scalar_type();
  size.require(
      x.dim() >= 1 && x.size(-1) == size.in &&
          (w.defined() ? type == w.scalar_type() : type == at::kFloat || type == at::kBFloat16),
      "x",
      x);
  if (layer.bias.defined())
    size.require(layer.bias.dim() == 1 && layer.bias.size(0) == size.out, "bias", layer.bias);
  if (layer.lora.mix.defined()) {
    size.require_kronecker(layer.lora);
  } else if (down.defined()) {
    size.require_low_rank(layer.lora);
  }
  if (const auto& magnitude = layer.lora.magnitude; magnitude.defined())
    size.require(down.defined() && magnitude.sizes() == at::IntArrayRef{size.out, 1} &&
                     magnitude.scalar_type() == at::kFloat,
                 "magnitude",
                 magnitude);
  auto shape = x.sizes().vec();
  shape.back() = size.out;
  const auto rows = x.reshape({-1, x.size(-1)});
  const auto given = [](const at::Tensor& t) {
    return t.defined() ? std::optional(t) : std::nullopt;
  };
  Dropped dropped;
  if (const AdapterDropout* d = layer.lora.dropout; d && down.defined())
    dropped = {d->values,
               d->ranks,
               d->seed,
               d->stream(),
               layer.lora.module,
               x.dim() > 1 ? rows.size(0) / std::max<int64_t>(x.size(0), 1) : 1};
  const bool adapted = down.defined() && !is_dropped(layer.lora);
  const bool low_rank = adapted && !layer.lora.mix.defined();
  if (!low_rank) dropped = {};
  at::Tensor y = LinearFunction::apply(rows,
                                       w.defined() ? w : layer.quantized.codes,
                                       given(layer.bias),
                                       low_rank ? given(down) : std::nullopt,
                                       low_rank ? given(up) : std::nullopt,
                                       layer.lora.scale,
                                       layer.quantized,
                                       dropped);
  if (adapted && !low_rank) y = add_kronecker(y, rows, layer.lora);
  if (adapted && layer.lora.magnitude.defined())
    y = scale_rows(y, layer.bias, layer.lora.magnitude, row_norms(layer, type));
  return y.view(shape);
}

}  // namespace

at::Tensor row_norms(const Linear& layer, at::ScalarType type) {
  const at::NoGradGuard no_grad;
  const LayerSize size(layer);
  const at::Tensor& matrix = layer.weight.defined() ? layer.weight : layer.quantized.codes;
  const auto options = matrix.options().dtype(at::kFloat);
  const at::Tensor norms = at::empty({size.out}, options);
  const at::Tensor plain = at::empty({0}, options.dtype(type));  // for its dtype
  with_weight(matrix, layer.quantized, plain, [&](const at::Tensor& w) {
    const MemoryScope scope(MemoryCause::kKernelScratch);
    const int64_t most = std::min(size.out, delta_rows(size.in, layer.lora));
    const at::Tensor buffer = at::empty({most, size.in}, options);
    for (int64_t first = 0; first < size.out; first += most) {
      const int64_t count = std::min(most, size.out - first);
      const at::Tensor rows = buffer.narrow(0, 0, count).copy_(w.narrow(0, first, count));
      if (layer.lora.down.defined()) add_delta(rows, first, layer.lora);
      norms.narrow(0, first, count).copy_(rows.mul_(rows).sum(1));
    }
    return 0;
  });
  // not 0, which would be divided by
  return norms.sqrt_().clamp_min_(std::numeric_limits<float>::epsilon());
}

}  // namespace flux
