// common/optim/adafactor.h - Adafactor: second moments of a matrix kept as a row and a column.
#pragma once
#include <optional>

namespace flux {

/// Update and states of transformers.Adafactor; defaults as sd-scripts' users run it on FLUX.
///
/// With a gradient g of two or more dimensions, R and C kept as means over the last and the last but
/// one dimension:
///
///   beta2 = 1 - step^decay_rate
///   R  <- beta2 R + (1 - beta2) mean(g^2 + eps1, -1),  C likewise
///   u  <- g / sqrt(R / mean(R)) / sqrt(C)            one dimension: g / sqrt(V), V kept in full
///   u  <- u / max(1, rms(u) / clip_threshold) * lr
///   m  <- beta1 m + (1 - beta1) u,  u <- m           only with beta1
///   p  <- p - lr weight_decay p - u
///
/// lr is the step's learning rate, or min(1e-2, 1 / sqrt(step)) with relative_step (1e-6 step for
/// 1e-2 with warmup_init); times max(eps2, rms(p)) with scale_parameter.
///
/// States: exp_avg_sq_row [.., R] and exp_avg_sq_col [.., C], or exp_avg_sq, float32; exp_avg with
/// beta1. The update is made in passes over the gradient, without a tensor of its size: scratch
/// stays below 1 MiB up to 1e9 elements.
/// Source: Shazeer and Stern 2018, arXiv:1804.04235; transformers 4.54.1, optimization.py.
struct AdafactorOptions {
  double eps1 = 1e-30, eps2 = 1e-3;
  double clip_threshold = 1.0;
  double decay_rate = -0.8;
  std::optional<double> beta1 = std::nullopt;
  double weight_decay = 0;
  bool scale_parameter = false, relative_step = false, warmup_init = false;
};

}  // namespace flux
