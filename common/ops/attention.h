// common/ops/attention.h - softmax(q k^T / sqrt(head)) v, without a score matrix in memory.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace flux {

/// Attention of every query to every key; not causal, no dropout.
///
///   q, k, v   [B, N, heads, head] float32|bfloat16; k and v may have another N
///   key_mask  [B, N of k] bool, true = may be attended to; the same for all heads and queries. At
///             least one per row
///   returns   [B, N, heads * head], heads in order
///
/// For the backward it keeps q, k, v, the result, and one float32 a query and head. On Meta shapes are made, and what
/// the kernels of the planned device (op.h) hold. Throws std::invalid_argument, naming the shapes, if they disagree.
at::Tensor attention(const at::Tensor& q,
                     const at::Tensor& k,
                     const at::Tensor& v,
                     const std::optional<at::Tensor>& key_mask = std::nullopt);

/// Which of LibTorch's kernels run on CUDA; never one by surprise. kFlash is the default. float32 and key masks, which
/// flash does not take, go to kEfficient; float32 goes there from kCudnn too.
enum class AttentionBackend { kFlash, kEfficient, kCudnn };
/// For the process; set it before the first step.
void set_attention_backend(AttentionBackend backend);
/// For the record of a run: "flash-cpu", "flash", "efficient", "cudnn". On Meta that of the planned device.
std::string_view attention_backend(const at::Tensor& q, bool masked);

}  // namespace flux
