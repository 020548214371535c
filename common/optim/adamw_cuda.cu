#include <algorithm>

#include "common/optim/adamw_cuda.h"

namespace flux {
namespace {

template <class T>
__global__ void adamw_kernel(
    T* parameter, const T* gradient, T* exp_avg, T* exp_avg_sq, int64_t n, AdamWScalars scalars) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) {
    adamw_element(parameter + i, gradient + i, exp_avg + i, exp_avg_sq + i, scalars);
  }
}

template <class T>
cudaError_t launch(T* parameter,
                   const T* gradient,
                   T* exp_avg,
                   T* exp_avg_sq,
                   int64_t n,
                   const AdamWScalars& scalars,
                   cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  constexpr int kThreads = 256;
  constexpr int64_t kMaxBlocks = 4096;  // enough to fill any GPU; the loop takes the rest
  const auto blocks = static_cast<unsigned>(std::min((n + kThreads - 1) / kThreads, kMaxBlocks));
  adamw_kernel<<<blocks, kThreads, 0, stream>>>(
      parameter, gradient, exp_avg, exp_avg_sq, n, scalars);
  return cudaGetLastError();
}

}  // namespace

cudaError_t adamw_cuda(float* parameter,
                       const float* gradient,
                       float* exp_avg,
                       float* exp_avg_sq,
                       int64_t n,
                       const AdamWScalars& scalars,
                       cudaStream_t stream) {
  return launch(parameter, gradient, exp_avg, exp_avg_sq, n, scalars, stream);
}

cudaError_t adamw_cuda(uint16_t* parameter,
                       const uint16_t* gradient,
                       uint16_t* exp_avg,
                       uint16_t* exp_avg_sq,
                       int64_t n,
                       const AdamWScalars& scalars,
                       cudaStream_t stream) {
  return launch(parameter, gradient, exp_avg, exp_avg_sq, n, scalars, stream);
}

}  // namespace flux
