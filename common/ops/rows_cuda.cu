#include <algorithm>

#include "common/ops/rows_cuda.h"

namespace flux::kernel {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;

/// Adds over the threads of a warp; all of them get the sum.
struct WarpSum {
  __device__ float operator()(float value) const {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
    return value;
  }
};

// What a warp does with item `i`: a row, a group of rows, or a sample.
template <class T>
__device__ void work(const ModulateForward<T>& a, int64_t i, int64_t lane) {
  modulate_row(a, i, lane, kWarp, WarpSum());
}
template <class T>
__device__ void work(const ModulateBackward<T>& a, int64_t i, int64_t lane) {
  modulate_backward_group(a, i, lane, kWarp, WarpSum());
}
template <class T>
__device__ void work(const GatedForward<T>& a, int64_t i, int64_t lane) {
  gated_row(a, i, lane, kWarp);
}
template <class T>
__device__ void work(const GatedBackward<T>& a, int64_t i, int64_t lane) {
  gated_backward_group(a, i, lane, kWarp);
}
template <class T>
__device__ void work(const GroupSums<T>& a, int64_t i, int64_t lane) {
  // all warps of a block row share a sample: there are few samples and many columns
  add_groups(a, i, lane + int64_t{blockIdx.y} * kWarp, int64_t{gridDim.y} * kWarp);
}
template <class T>
__device__ void work(const GeluForward<T>& a, int64_t i, int64_t lane) {
  gelu_row(a, i, lane, kWarp);
}
template <class T>
__device__ void work(const GeluBackward<T>& a, int64_t i, int64_t lane) {
  gelu_backward_row(a, i, lane, kWarp);
}
template <class T>
__device__ void work(const LossForward<T>& a, int64_t i, int64_t lane) {
  loss_group(a, i, lane, kWarp, WarpSum());
}
template <class T>
__device__ void work(const LossBackward<T>& a, int64_t i, int64_t lane) {
  loss_backward_row(a, i, lane, kWarp);
}

template <class Args>
__global__ void warps_kernel(Args args, int64_t count) {
  const int64_t warps = int64_t{gridDim.x} * blockDim.x / kWarp;
  for (int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp; i < count; i += warps)
    work(args, i, threadIdx.x % kWarp);
}

/// A warp for each of `count` items, `share` warps for one of them; the kernel's loop takes what is beyond the limit.
template <class Args>
cudaError_t launch(const Args& args, int64_t count, cudaStream_t stream, unsigned share = 1) {
  if (count == 0 || args.shape.width == 0) return cudaSuccess;
  constexpr int64_t kWarpsPerBlock = kThreads / kWarp, kMaxBlocks = 1 << 16;
  const auto blocks = std::min((count + kWarpsPerBlock - 1) / kWarpsPerBlock, kMaxBlocks);
  warps_kernel<<<dim3(static_cast<unsigned>(blocks), share), kThreads, 0, stream>>>(args, count);
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t modulate_cuda(const ModulateForward<T>& args, cudaStream_t stream) {
  return launch(args, args.shape.num_rows(), stream);
}
template <class T>
cudaError_t modulate_cuda(const ModulateBackward<T>& args, cudaStream_t stream) {
  return launch(args, args.shape.num_groups(), stream);
}
template <class T>
cudaError_t gated_cuda(const GatedForward<T>& args, cudaStream_t stream) {
  return launch(args, args.shape.num_rows(), stream);
}
template <class T>
cudaError_t gated_cuda(const GatedBackward<T>& args, cudaStream_t stream) {
  return launch(args, args.shape.num_groups(), stream);
}
template <class T>
cudaError_t add_groups_cuda(const GroupSums<T>& args, cudaStream_t stream) {
  const int64_t packs = (args.shape.width + kPack - 1) / kPack;
  const auto share = static_cast<unsigned>(std::min<int64_t>((packs + kWarp - 1) / kWarp, 1024));
  return launch(args, args.shape.samples, stream, std::max(share, 1u));
}
template <class T>
cudaError_t gelu_cuda(const GeluForward<T>& args, cudaStream_t stream) {
  return launch(args, args.shape.num_rows(), stream);
}
template <class T>
cudaError_t gelu_cuda(const GeluBackward<T>& args, cudaStream_t stream) {
  return launch(args, args.shape.num_rows(), stream);
}
template <class T>
cudaError_t loss_cuda(const LossForward<T>& args, cudaStream_t stream) {
  return launch(args, args.shape.num_groups(), stream);
}
template <class T>
cudaError_t loss_cuda(const LossBackward<T>& args, cudaStream_t stream) {
  return launch(args, args.shape.num_rows(), stream);
}

#define FLUX_ROWS_CUDA(T)                                                       \
  template cudaError_t modulate_cuda(const ModulateForward<T>&, cudaStream_t);  \
  template cudaError_t modulate_cuda(const ModulateBackward<T>&, cudaStream_t); \
  template cudaError_t gated_cuda(const GatedForward<T>&, cudaStream_t);        \
  template cudaError_t gated_cuda(const GatedBackward<T>&, cudaStream_t);       \
  template cudaError_t add_groups_cuda(const GroupSums<T>&, cudaStream_t);      \
  template cudaError_t gelu_cuda(const GeluForward<T>&, cudaStream_t);          \
  template cudaError_t gelu_cuda(const GeluBackward<T>&, cudaStream_t);         \
  template cudaError_t loss_cuda(const LossForward<T>&, cudaStream_t);          \
  template cudaError_t loss_cuda(const LossBackward<T>&, cudaStream_t);
FLUX_ROWS_CUDA(float)
FLUX_ROWS_CUDA(Bf16Bits)
#undef FLUX_ROWS_CUDA

}  // namespace flux::kernel
