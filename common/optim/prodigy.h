// common/optim/prodigy.h - Prodigy: AdamW that finds its step size by itself.
#pragma once
#include <limits>
#include <optional>

namespace flux {

/// The learning rate of a step, usually 1, is multiplied by d, which is estimated from how far the
/// weights have come along their gradients, over all parameters: so gradients are seen twice
/// (Optimizer::two_phase).
///
/// States: exp_avg, exp_avg_sq, and in float32 s and p0, the weights of the beginning. Run numbers: d,
/// d_max, d_numerator, k (steps made).
/// Source: Mishchenko and Defazio 2023, arXiv:2306.06101; prodigyopt 1.1.2 with decoupled decay.
struct ProdigyOptions {
  double beta1 = 0.9, beta2 = 0.999;
  std::optional<double> beta3 = std::nullopt;  // else the square root of beta2
  double eps = 1e-8;
  double weight_decay = 0;
  double d0 = 1e-6, d_coef = 1;
  double growth_rate = std::numeric_limits<double>::infinity();  // of d, a step
  bool use_bias_correction = false, safeguard_warmup = false;
};

}  // namespace flux
