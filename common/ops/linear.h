// common/ops/linear.h - the Linear layer as a plain struct of tensors, with room for a low-rank
// adapter.
#pragma once
#include <ATen/core/Tensor.h>

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
  uint64_t pass = 0;  // of step and micro-batch
  bool any() const { return values > 0 || ranks > 0 || modules > 0; }
};

/// A low-rank addition to a Linear: W + scale * up @ down.
///
///   down     [rank, in]  float32 or the dtype of the layer; undefined: no adapter
///   up       [out, rank] as down
///   scale    multiplier * alpha / rank
///   dropout  null: none
///   module   its stream of random numbers
struct LowRank {
  at::Tensor down, up;
  double scale = 1;
  const AdapterDropout* dropout = nullptr;
  uint64_t module = 0;
};

/// One Linear layer. Copies share the tensors.
///
///   weight     [out, in] float32|bfloat16
///   bias       [out], or undefined
///   quantized  the weight in 8 or 4 bits, frozen; then `weight` is undefined
struct Linear {
  at::Tensor weight, bias;
  LowRank lora;
  QuantizedWeight quantized{};
};

/// x W^T + bias, and with an adapter + scale * (x down^T) up^T: the products in the dtype of x,
/// whatever the adapter is stored in. With `up` at zero the result has the bits of the layer
/// without an adapter. A quantised weight gives the bits that its plain form in the dtype of x would
/// give; that form is made anew in forward and backward, in common/quant/scratch.h, and never kept.
///
///   x        [..., in], dtype and device of weight; for a quantised one float32|bfloat16
///   returns  [..., out]
///
/// Gradients flow to x, weight, bias, down and up, each in its own dtype; only those asked for are
/// computed. Throws std::invalid_argument, naming the shapes or dtypes, if they disagree.
at::Tensor linear(const Linear& layer, const at::Tensor& x);

}  // namespace flux
