// common/optim/adamw8bit_cpu.h - AdamW8bit over a range of a parameter. No LibTorch, so that it has its
// own compiler flags.
#pragma once
#include <cstdint>

#include "common/optim/adamw8bit_math.h"
#include "common/optim/operands.h"

namespace flux {

/// Elements [begin, end); begin is a multiple of kTile. states: state1, state2 as codes. The same bits
/// on any machine.
void adamw8bit_range(const Operands& operands,
                     float* absmax1,
                     float* absmax2,
                     const AdamW8bitScalars& scalars,
                     int64_t begin,
                     int64_t end);
/// The same with float32 states.
void adamw8bit_small_range(const Operands& operands,
                           const AdamW8bitScalars& scalars,
                           int64_t begin,
                           int64_t end);

}  // namespace flux
