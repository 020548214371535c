// common/ops/attention.h - softmax(q k^T / sqrt(head)) v, without a score matrix in memory.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace flux {

/// Attention of every query to every key; not causal, no dropout. On the Meta device only shapes
/// are made.
///
///   q, k, v   [B, N, heads, head] float32|bfloat16; k and v may have another N
///   key_mask  [B, N of k] bool, true = may be attended to; the same for all heads and queries. At
///             least one per row
///   returns   [B, N, heads * head], heads in order
///
/// Throws std::invalid_argument, naming the shapes, if they disagree.
at::Tensor attention(const at::Tensor& q,
                     const at::Tensor& k,
                     const at::Tensor& v,
                     const std::optional<at::Tensor>& key_mask = std::nullopt);

}  // namespace flux
