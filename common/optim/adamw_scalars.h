// common/optim/adamw_scalars.h - what CPU and CUDA kernels of AdamW are given.
#pragma once
#include <cstdint>

#include "common/optim/adamw.h"
#include "common/optim/adamw_math.h"

namespace flux {

/// Throws std::invalid_argument unless step >= 1.
AdamWScalars adamw_scalars(double learning_rate, const AdamWOptions& options, int64_t step);

}  // namespace flux
