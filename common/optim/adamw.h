// common/optim/adamw.h - AdamW: Adam with weight decay taken off the weights directly.
#pragma once
#include <cstdint>

#include "common/tensor/fwd.h"

namespace flux {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999;
  double eps = 1e-8;  // outside the square root
  double weight_decay = 0.01;
};

/// One update of one tensor, in place:
///
///   p  <- p (1 - lr weight_decay)
///   m  <- m + (1 - beta1) (g - m)
///   v  <- beta2 v + (1 - beta2) g^2
///   p  <- p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
///
///   parameter   any shape, float32|bfloat16, contiguous
///   gradient    shape, dtype and device of parameter
///   exp_avg     m: shape, dtype and device of parameter; zeros before step 1
///   exp_avg_sq  v: the same
///   step        from 1
///
/// Arithmetic is float32, rounded to the dtype after each operation. CPU results do not depend on
/// the number of threads. Throws std::invalid_argument, naming the argument and both values, if
/// they disagree; on a device without this op, c10::Error. Source: Loshchilov and Hutter 2019,
/// arXiv:1711.05101, algorithm 2; order of operations as in torch.optim.AdamW.
void adamw_step(const at::Tensor& parameter,
                const at::Tensor& gradient,
                const at::Tensor& exp_avg,
                const at::Tensor& exp_avg_sq,
                double learning_rate,
                const AdamWOptions& options,
                int64_t step);

}  // namespace flux
