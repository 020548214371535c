// common/ops/rows_cuda.h - the CUDA kernels of rows_kernel.h; compiled into libflux_cuda.so. No LibTorch.
#pragma once
#include <cuda_runtime_api.h>

#include "common/ops/rows_kernel.h"

namespace flux::kernel {

// All rows on `stream`, a warp a row or a group of rows. Return the launch's error. T is float or Bf16Bits.

template <class T>
cudaError_t modulate_cuda(const ModulateForward<T>& args, cudaStream_t stream);
template <class T>
cudaError_t modulate_cuda(const ModulateBackward<T>& args, cudaStream_t stream);
template <class T>
cudaError_t gated_cuda(const GatedForward<T>& args, cudaStream_t stream);
template <class T>
cudaError_t gated_cuda(const GatedBackward<T>& args, cudaStream_t stream);
template <class T>
cudaError_t add_groups_cuda(const GroupSums<T>& args, cudaStream_t stream);
template <class T>
cudaError_t gelu_cuda(const GeluForward<T>& args, cudaStream_t stream);
template <class T>
cudaError_t gelu_cuda(const GeluBackward<T>& args, cudaStream_t stream);
template <class T>
cudaError_t loss_cuda(const LossForward<T>& args, cudaStream_t stream);
template <class T>
cudaError_t loss_cuda(const LossBackward<T>& args, cudaStream_t stream);

}  // namespace flux::kernel
