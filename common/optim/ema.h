// common/optim/ema.h - an exponential moving average of weights.
#pragma once
#include <cstdint>

#include "common/tensor/fwd.h"

namespace flux {

struct EmaOptions {
  double decay = 0.9999, min_decay = 0;
  int64_t update_after_step = 0;
  bool use_warmup = false;  // 1 - (1 + s / inv_gamma)^-power instead of (1 + s) / (10 + s)
  double inv_gamma = 1, power = 2.0 / 3;
};

/// The decay of step `step`, from 1: with s = step - update_after_step - 1, 0 while s <= 0 (the average
/// is the weights), else as above, limited to [min_decay, decay].
/// Source: diffusers 0.32.1, EMAModel.get_decay.
double ema_decay(const EmaOptions& options, int64_t step);

/// average <- average - (1 - decay) (average - weights), in place.
///
///   average  float32|bfloat16, contiguous; bfloat16 is rounded stochastically, since a decay near 1
///            changes less than its last place
///   weights  shape and device of average; float32|bfloat16
///   seed, step, id, offset  of the random numbers, as of optimizer steps: a Slot's
///
/// Throws std::invalid_argument, naming the argument and both values, if they disagree.
void ema_update(const at::Tensor& average,
                const at::Tensor& weights,
                double decay,
                uint64_t seed,
                int64_t step,
                uint64_t id,
                int64_t offset = 0);

}  // namespace flux
