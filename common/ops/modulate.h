// common/ops/modulate.h - adaptive LayerNorm and gated residual of the diffusion transformer.
#pragma once
#include <ATen/core/Tensor.h>

namespace flux {

/// LayerNorm over the last dimension without weight and bias; statistics in float32.
at::Tensor layer_norm(const at::Tensor& x, double eps = 1e-6);

/// (1 + scale) * layer_norm(x) + shift.
///
///   x             [B, N, H] float32|bfloat16
///   shift, scale  [B, 1, H], dtype of x
///
/// Source: Peebles and Xie 2022, arXiv:2212.09748 (AdaLN).
at::Tensor modulate(const at::Tensor& x,
                    const at::Tensor& shift,
                    const at::Tensor& scale,
                    double eps = 1e-6);

/// x + gate * update; gate [B, 1, H].
at::Tensor gated_residual(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& update);

}  // namespace flux
