// common/optim/elementwise_cpu.h - updates of single elements over a range of a parameter. No LibTorch,
// so that it has its own compiler flags.
#pragma once
#include <cstdint>

#include "common/optim/elements_math.h"
#include "common/optim/operands.h"

namespace flux {

// Elements [begin, end); begin is a multiple of kTile. The compiler makes versions for AVX-512, AVX2 and
// plain x86-64, chosen when the program starts; all give the same bits, since none may fuse a
// multiplication with an addition. States are listed as Operands::states.

/// exp_avg, exp_avg_sq.
void adamw_range(const Operands& operands, const AdamWScalars& scalars, int64_t begin, int64_t end);
/// exp_avg.
void lion_range(const Operands& operands, const LionScalars& scalars, int64_t begin, int64_t end);
/// momentum_buffer.
void sgd_range(const Operands& operands, const SgdScalars& scalars, int64_t begin, int64_t end);
/// z, exp_avg_sq.
void schedule_free_range(const Operands& operands,
                         const ScheduleFreeScalars& scalars,
                         int64_t begin,
                         int64_t end);
/// exp_avg, exp_avg_sq.
void prodigy_range(const Operands& operands,
                   const ProdigyScalars& scalars,
                   int64_t begin,
                   int64_t end);
/// exp_avg, exp_avg_sq, s and p0, the last two float32. Adds to sums[0] the sum of g (p0 - p), to sums[1]
/// that of |s|.
void prodigy_observe_range(const Operands& operands,
                           const ProdigyScalars& scalars,
                           int64_t begin,
                           int64_t end,
                           double* sums);
/// The parameter is the average, the gradient the weights.
void ema_range(const Operands& operands, const EmaScalars& scalars, int64_t begin, int64_t end);

}  // namespace flux
