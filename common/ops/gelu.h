// common/ops/gelu.h - GELU in its tanh form, by itself and written behind another tensor.
#pragma once
#include <ATen/core/Tensor.h>

namespace flux {

// Four faces each: CPU, CUDA (in libflux_cuda.so), Meta, and an analytic backward that keeps x alone. Arithmetic is
// float32, with one rounding at the end. They throw std::invalid_argument, naming the shapes, if these disagree.

/// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).
///
///   x  [B, N, width] float32|bfloat16
///
/// Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
at::Tensor gelu_tanh(const at::Tensor& x);

/// cat({left, gelu_tanh(x)}, -1) without the gelu by itself in memory.
///
///   left     [B, N, width of left], dtype of x
///   x        [B, N, width of x] float32|bfloat16; rows may lie further apart (a slice of a wider Linear)
///   returns  [B, N, width of left + width of x]
at::Tensor concat_gelu(const at::Tensor& left, const at::Tensor& x);

}  // namespace flux
