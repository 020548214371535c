// common/ops/qk_norm_rope_cuda.h - the CUDA kernels of qk_norm_rope; compiled into libflux_cuda.so.
// No LibTorch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include "common/ops/qk_norm_rope_kernel.h"

namespace flux::kernel {

using Bf16 = __nv_bfloat16;

// All rows on `stream`, a warp a row (forward) or a group of rows (backward). Return the launch's
// error.
cudaError_t qk_norm_rope_cuda(const QkNormRopeForward<float>& args, cudaStream_t stream);
cudaError_t qk_norm_rope_cuda(const QkNormRopeForward<Bf16>& args, cudaStream_t stream);
cudaError_t qk_norm_rope_backward_cuda(const QkNormRopeBackward<float>& args, cudaStream_t stream);
cudaError_t qk_norm_rope_backward_cuda(const QkNormRopeBackward<Bf16>& args, cudaStream_t stream);

}  // namespace flux::kernel
