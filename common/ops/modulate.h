// common/ops/modulate.h - adaptive LayerNorm and gated residual of the diffusion transformer.
#pragma once
#include <ATen/core/Tensor.h>

namespace flux {

// Four faces each: CPU, CUDA (in libflux_cuda.so), Meta, and an analytic backward. Arithmetic is float32, with one
// rounding at the end. They throw std::invalid_argument, naming the argument and the shapes, if these disagree.

/// LayerNorm over the last dimension without weight and bias.
at::Tensor layer_norm(const at::Tensor& x, double eps = 1e-6);

/// (1 + scale) * layer_norm(x) + shift.
///
///   x             [B, N, H] float32|bfloat16
///   shift, scale  [B, 1, H], dtype of x
///
/// For the backward it keeps x, scale, and two float32 a row. Source: Peebles and Xie 2022, arXiv:2212.09748 (AdaLN).
at::Tensor modulate(const at::Tensor& x,
                    const at::Tensor& shift,
                    const at::Tensor& scale,
                    double eps = 1e-6);

/// x + gate * update.
///
///   x, update  [B, N, H] float32|bfloat16
///   gate       [B, 1, H], dtype of x
at::Tensor gated_residual(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& update);

}  // namespace flux
