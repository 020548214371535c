// common/quant/quant_cuda.h - the CUDA kernels of fp8 and NF4; compiled into libflux_cuda.so. No
// LibTorch.
#pragma once
#include <cuda_runtime_api.h>

#include "common/quant/quant_kernel.h"

namespace flux::kernel {

// All blocks of a weight on `stream`, a warp a block; memory as for the CPU twins (quant_cpu.h).
// Return the launch's error. T is float or Bf16Bits.

template <class T>
cudaError_t fp8_quantize_cuda(
    const QuantBlocks& blocks, const T* values, uint8_t* codes, float* scales, cudaStream_t stream);
template <class T>
cudaError_t fp8_dequantize_cuda(const QuantBlocks& blocks,
                                const uint8_t* codes,
                                const float* scales,
                                T* out,
                                cudaStream_t stream);
template <class T>
cudaError_t nf4_quantize_cuda(
    const QuantBlocks& blocks, const T* values, uint8_t* codes, float* scales, cudaStream_t stream);
template <class T>
cudaError_t nf4_dequantize_cuda(const QuantBlocks& blocks,
                                const uint8_t* codes,
                                const float* scales,
                                T* out,
                                cudaStream_t stream);

}  // namespace flux::kernel
