// common/optim/run_update.h - from a slot to the op: what the kinds of optimizers share.
#pragma once
#include <cstdint>

#include "common/optim/optimizer.h"
#include "common/optim/optimizer_op.h"

namespace flux {

/// How a parameter of that dtype keeps its weights.
Keep keep_of(c10::ScalarType parameter, WeightMode mode);
/// Four words of the project's stream for this seed, step and parameter are the key of the parameter's
/// own stream of 16-bit numbers.
RoundingKey rounding_key(uint64_t seed, int64_t step, uint64_t id);
/// What a step on `slot` hands to the op besides tensors and numbers.
StepKey step_key(const Slot& slot, const StepScalars& step, const OptimizerPrecision& precision);

template <class Scalars>
void run_update(const Slot& slot,
                const StepScalars& step,
                const OptimizerPrecision& precision,
                UpdateKind kind,
                const Scalars& scalars,
                at::TensorList scratch = {}) {
  optimizer_step(slot.parameter,
                 slot.gradient,
                 slot.states,
                 scratch,
                 kind,
                 to_numbers(scalars),
                 step_key(slot, step, precision));
}

}  // namespace flux
