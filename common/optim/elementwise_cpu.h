// common/optim/elementwise_cpu.h - updates of single elements over a range of a parameter. No LibTorch,
// so that it has its own compiler flags.
#pragma once
#include <cstdint>

#include "common/optim/adamw_math.h"
#include "common/optim/operands.h"

namespace flux {

/// Elements [begin, end); begin is a multiple of kTile. The compiler makes versions for AVX-512, AVX2
/// and plain x86-64, chosen when the program starts; all give the same bits, since none may fuse a
/// multiplication with an addition. states: exp_avg, exp_avg_sq.
void adamw_range(const Operands& operands, const AdamWScalars& scalars, int64_t begin, int64_t end);

}  // namespace flux
