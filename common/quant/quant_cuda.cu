#include <algorithm>

#include "common/quant/quant_cuda.h"

namespace flux::kernel {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;

/// The largest over the threads of a warp; all of them get it.
struct WarpMax {
  __device__ uint32_t operator()(uint32_t value) const {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      value = max(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
    return value;
  }
};

/// Calls run(index, first, n, lane) for the blocks of a warp.
template <class Run>
__device__ void for_blocks(const QuantBlocks& blocks, const Run& run) {
  const int64_t warps = int64_t{gridDim.x} * blockDim.x / kWarp;
  for (int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp; i < blocks.count();
       i += warps)
    run(i, blocks.first(i), blocks.length(i), threadIdx.x % kWarp);
}

template <class T>
__global__ void fp8_quantize_kernel(QuantBlocks blocks,
                                    const T* values,
                                    uint8_t* codes,
                                    float* scales) {
  for_blocks(blocks, [=](int64_t i, int64_t first, int64_t n, int64_t lane) {
    const float scale =
        fp8_quantize_block(values + first, n, codes + first, lane, kWarp, WarpMax());
    if (lane == 0) scales[i] = scale;
  });
}

template <class T>
__global__ void fp8_dequantize_kernel(QuantBlocks blocks,
                                      const uint8_t* codes,
                                      const float* scales,
                                      T* out) {
  for_blocks(blocks, [=](int64_t i, int64_t first, int64_t n, int64_t lane) {
    fp8_dequantize_block(codes + first, scales[i], n, out + first, lane, kWarp);
  });
}

template <class T>
__global__ void nf4_quantize_kernel(QuantBlocks blocks,
                                    const T* values,
                                    uint8_t* codes,
                                    float* scales) {
  for_blocks(blocks, [=](int64_t i, int64_t first, int64_t n, int64_t lane) {
    const float scale = nf4_quantize_block(
        values + first, n, n == blocks.block, codes + first / 2, lane, kWarp, WarpMax());
    if (lane == 0) scales[i] = scale;
  });
}

template <class T>
__global__ void nf4_dequantize_kernel(QuantBlocks blocks,
                                      const uint8_t* codes,
                                      const float* scales,
                                      T* out) {
  for_blocks(blocks, [=](int64_t i, int64_t first, int64_t n, int64_t lane) {
    const float scale = scales[i];
    const auto value_of = [scale](uint32_t code) { return nf4_scaled<T>(code, scale); };
    nf4_dequantize_block(codes + first / 2, n, out + first, lane, kWarp, value_of);
  });
}

/// Thread blocks for a warp a block; the kernels' loops take what is beyond the limit.
unsigned num_blocks(const QuantBlocks& blocks) {
  constexpr int64_t kWarpsPerBlock = kThreads / kWarp, kMaxBlocks = 1 << 16;
  return static_cast<unsigned>(
      std::min((blocks.count() + kWarpsPerBlock - 1) / kWarpsPerBlock, kMaxBlocks));
}

}  // namespace

template <class T>
cudaError_t fp8_quantize_cuda(const QuantBlocks& blocks,
                              const T* values,
                              uint8_t* codes,
                              float* scales,
                              cudaStream_t stream) {
  if (blocks.count() == 0) return cudaSuccess;
  fp8_quantize_kernel<<<num_blocks(blocks), kThreads, 0, stream>>>(blocks, values, codes, scales);
  return cudaGetLastError();
}

template <class T>
cudaError_t fp8_dequantize_cuda(const QuantBlocks& blocks,
                                const uint8_t* codes,
                                const float* scales,
                                T* out,
                                cudaStream_t stream) {
  if (blocks.count() == 0) return cudaSuccess;
  fp8_dequantize_kernel<<<num_blocks(blocks), kThreads, 0, stream>>>(blocks, codes, scales, out);
  return cudaGetLastError();
}

template <class T>
cudaError_t nf4_quantize_cuda(const QuantBlocks& blocks,
                              const T* values,
                              uint8_t* codes,
                              float* scales,
                              cudaStream_t stream) {
  if (blocks.count() == 0) return cudaSuccess;
  nf4_quantize_kernel<<<num_blocks(blocks), kThreads, 0, stream>>>(blocks, values, codes, scales);
  return cudaGetLastError();
}

template <class T>
cudaError_t nf4_dequantize_cuda(const QuantBlocks& blocks,
                                const uint8_t* codes,
                                const float* scales,
                                T* out,
                                cudaStream_t stream) {
  if (blocks.count() == 0) return cudaSuccess;
  nf4_dequantize_kernel<<<num_blocks(blocks), kThreads, 0, stream>>>(blocks, codes, scales, out);
  return cudaGetLastError();
}

#define FLUX_QUANT_INSTANCES(T)                                            \
  template cudaError_t fp8_quantize_cuda(                                  \
      const QuantBlocks&, const T*, uint8_t*, float*, cudaStream_t);       \
  template cudaError_t fp8_dequantize_cuda(                                \
      const QuantBlocks&, const uint8_t*, const float*, T*, cudaStream_t); \
  template cudaError_t nf4_quantize_cuda(                                  \
      const QuantBlocks&, const T*, uint8_t*, float*, cudaStream_t);       \
  template cudaError_t nf4_dequantize_cuda(                                \
      const QuantBlocks&, const uint8_t*, const float*, T*, cudaStream_t);
FLUX_QUANT_INSTANCES(float)
FLUX_QUANT_INSTANCES(Bf16Bits)
#undef FLUX_QUANT_INSTANCES

}  // namespace flux::kernel
