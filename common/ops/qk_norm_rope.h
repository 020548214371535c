// common/ops/qk_norm_rope.h - from the packed output of a qkv Linear to what attention reads, in
// one pass.
#pragma once
#include <ATen/core/Tensor.h>

namespace flux {

struct Qkv {
  at::Tensor q, k, v;  // [B, N, heads, head] each
};

/// Splits qkv, applies RMSNorm over each head of q and k (x / sqrt(mean(x^2) + eps), times the
/// learned scale), then turns the interleaved pairs (2p, 2p + 1) of q and k by the token's angle p.
/// Statistics and rotation are float32, with one rounding at the end.
///
///   qkv          [B, N, 3 * heads * head] float32|bfloat16: q, k, v one after the other, heads in
///                order. The last dimension has stride 1; rows may lie further apart (a slice of a
///                wider Linear is not copied)
///   query_scale, key_scale  [head]; float32 or the dtype of qkv. head is even
///   rope_cos, rope_sin      [1 or B, N, head / 2] float32, no gradient
///   returns      q, k, v [B, N, heads, head] in the dtype of qkv, contiguous
///
/// Four faces: CPU, CUDA (in libflux_cuda.so), Meta, and an analytic backward to qkv and both
/// scales. Throws std::invalid_argument, naming the argument and the shapes, if they disagree.
/// Source: Zhang and Sennrich 2019, arXiv:1910.07467; Su et al. 2021, arXiv:2104.09864;
/// black-forest-labs/flux, src/flux/math.py.
Qkv qk_norm_rope(const at::Tensor& qkv,
                 const at::Tensor& query_scale,
                 const at::Tensor& key_scale,
                 const at::Tensor& rope_cos,
                 const at::Tensor& rope_sin,
                 double eps = 1e-6);

}  // namespace flux
