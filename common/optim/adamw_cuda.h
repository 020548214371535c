// common/optim/adamw_cuda.h - AdamW over a range of device memory; compiled into libflux_cuda.so.
// No LibTorch.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/optim/adamw_math.h"

namespace flux {

/// Elements [0, n) on `stream`, as adamw_cpu() does them. Returns the launch's error.
cudaError_t adamw_cuda(float* parameter,
                       const float* gradient,
                       float* exp_avg,
                       float* exp_avg_sq,
                       int64_t n,
                       const AdamWScalars& scalars,
                       cudaStream_t stream);
/// bfloat16 as its bits.
cudaError_t adamw_cuda(uint16_t* parameter,
                       const uint16_t* gradient,
                       uint16_t* exp_avg,
                       uint16_t* exp_avg_sq,
                       int64_t n,
                       const AdamWScalars& scalars,
                       cudaStream_t stream);

}  // namespace flux
