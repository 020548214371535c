// common/ops/linear.h - the Linear layer as a plain struct of tensors, with room for a low-rank
// adapter.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "common/quant/quant.h"

namespace flux {

/// What of adapters is left out while they are trained, drawn anew for every pass. Of what is computed in a pass the same
/// is left out whenever it is computed again. Shared by the layers of a model. On Meta nothing is.
struct AdapterDropout {
  double values = 0;  // share of the elements of x down^T; the others grow by 1 / (1 - share)
  double ranks =
      0;  // of its columns, for each sample on its own (the first dimension of x); grows as above
  double modules = 0;  // of whole adapters; the others stay as they are
  uint64_t seed = 0;
  // an update's samples are drawn for one by one, however it is cut into micro-batches; whole adapters for all of it
  uint64_t pass = 0;    // number of the update
  uint64_t sample = 0;  // in it: of the first sample of x
  /// First number of the streams of x's samples.
  uint64_t stream() const { return (pass << 20) + sample; }
  bool any() const { return values > 0 || ranks > 0 || modules > 0; }
};

/// The tensors of an adapter by name, in this order wherever they are walked through.
inline constexpr std::array<const char*, 4> kAdapterParts{"down", "up", "mix", "magnitude"};

/// An addition to a Linear: W + delta, delta = scale * up @ down.
///
///   down       [rank, in]  float32 or the dtype of the layer; undefined: no adapter
///   up         [out, rank] as down
///   mix        LoKr, delta = scale * kron(mix, up @ down): [A, C] beside up [B, rank] and down [rank, D], with
///              A * B = out and C * D = in; `up` undefined: delta = scale * kron(mix, down), down [B, D]
///   magnitude  DoRA, [out, 1] float32: the norm that each row of W + delta is scaled to; for gradients the norm that it
///              has is a constant. Sources: arXiv:2402.09353, section 4.3; huggingface/peft, tuners/lora/dora.py
///   scale      multiplier * alpha / rank
///   dropout    null: none
///   module     its stream of random numbers
struct LowRank {
  at::Tensor down, up;
  double scale = 1;
  const AdapterDropout* dropout = nullptr;
  uint64_t module = 0;
  at::Tensor mix{}, magnitude{};

  std::array<at::Tensor*, 4> parts() { return {&down, &up, &mix, &magnitude}; }
};

/// An adapter beside others, for computing without gradients.
struct AddedAdapter {
  LowRank lora;
  double multiplier = 1;  // of all that it does to the layer; not in lora.scale
};

/// One Linear layer. Copies share the tensors.
///
///   weight     [out, in] float32|bfloat16
///   bias       [out], or undefined
///   quantized  the weight in 8 or 4 bits, frozen; then `weight` is undefined
///   added      what each does to the layer alone, W' - W, is added: their order does not matter
struct Linear {
  at::Tensor weight, bias;
  LowRank lora;
  QuantizedWeight quantized{};
  std::vector<AddedAdapter> added{};
};

/// x W^T + bias, and with an adapter + scale * (x down^T) up^T: the products in the dtype of x,
/// whatever the adapter is stored in. With `up` at zero the result has the bits of the layer
/// without an adapter, and with `magnitude` at row_norms() too. A quantised weight gives the bits that its plain form in the dtype of x would
/// give; that form is made anew in forward and backward, in common/quant/scratch.h, and never kept.
///
///   x        [..., in], dtype and device of weight; for a quantised one float32|bfloat16
///   returns  [..., out]
///
/// Gradients flow to x, weight, bias and the tensors of the adapter, each in its own dtype; only those asked for are
/// computed. Throws std::invalid_argument, naming the shapes or dtypes, if they disagree; std::logic_error for added
/// adapters where gradients are recorded.
at::Tensor linear(const Linear& layer, const at::Tensor& x);

/// The norms of the rows of W + delta, [out] float32, computed in float32 some rows at a time, of a quantised weight from
/// its plain form in `type`. Not differentiable. A row of zeros has a norm just above 0.
at::Tensor row_norms(const Linear& layer, at::ScalarType type);

}  // namespace flux
