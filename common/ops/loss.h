// common/ops/loss.h - the losses of a batch's elements, summed for each sample in one pass.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "common/ops/loss_type.h"

namespace flux {

/// Sums over each sample of mask * loss(d), d = prediction - target: l2 d^2, l1 |d|, huber 2 c (sqrt(d^2 + c^2) - c),
/// smooth_l1 2 (sqrt(d^2 + c^2) - c).
///
/// Four faces: CPU, CUDA (in libflux_cuda.so), Meta, and an analytic backward that keeps the inputs alone. Arithmetic is
/// float32 in sums of fixed order; no tensor of the prediction's size is made but its gradient, in its dtype.
///
///   prediction  [B, N, width] float32|bfloat16
///   target      [B, N, width] float32
///   c           [B] float32, > 0; not read by l2 and l1
///   mask        [B, N, width] float32, or nothing: ones
///   returns     [B] float32, differentiable in prediction
///
/// Throws std::invalid_argument if shapes disagree.
at::Tensor loss_sums(LossType type,
                     const at::Tensor& prediction,
                     const at::Tensor& target,
                     const at::Tensor& c,
                     const std::optional<at::Tensor>& mask);

}  // namespace flux
