// common/ops/linear.h - the Linear layer as a plain struct of tensors, with room for a low-rank
// adapter.
#pragma once
#include <ATen/core/Tensor.h>

#include "common/quant/quant.h"

namespace flux {

/// A low-rank addition to a Linear: W + scale * up @ down.
///
///   down   [rank, in]  float32 or the dtype of the layer; undefined: no adapter
///   up     [out, rank] as down
///   scale  multiplier * alpha / rank
struct LowRank {
  at::Tensor down, up;
  double scale = 1;
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
