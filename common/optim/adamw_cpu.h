// common/optim/adamw_cpu.h - AdamW over a range of memory. No LibTorch, so that it has its own
// compiler flags.
#pragma once
#include <cstdint>

#include "common/optim/adamw_math.h"

namespace flux {

/// Elements [0, n). The compiler makes a version for AVX-512, AVX2 and plain x86-64, chosen when
/// the program starts; all give the same bits, since none may fuse a multiplication with an
/// addition.
void adamw_cpu(float* parameter,
               const float* gradient,
               float* exp_avg,
               float* exp_avg_sq,
               int64_t n,
               const AdamWScalars& scalars);
/// bfloat16 as its bits.
void adamw_cpu(uint16_t* parameter,
               const uint16_t* gradient,
               uint16_t* exp_avg,
               uint16_t* exp_avg_sq,
               int64_t n,
               const AdamWScalars& scalars);

}  // namespace flux
