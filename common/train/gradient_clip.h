// common/train/gradient_clip.h - bounds the size of an update's gradient.
#pragma once
#include <span>

#include "common/tensor/fwd.h"

namespace flux {

/// The l2 norm over all elements of all tensors, in float32 per tensor and double over tensors; 0
/// for none.
double global_norm(std::span<const at::Tensor> gradients);

/// Multiplies the gradients in place by min(1, max_norm / (norm + 1e-6)); max_norm 0 leaves them
/// alone. Source: torch.nn.utils.clip_grad_norm_.
void clip_to_norm(std::span<const at::Tensor> gradients, double norm, double max_norm);

/// Both: returns the norm before clipping.
double clip_global_norm(std::span<const at::Tensor> gradients, double max_norm);

}  // namespace flux
