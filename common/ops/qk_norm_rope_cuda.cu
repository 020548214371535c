#include <algorithm>

#include "common/ops/qk_norm_rope_cuda.h"

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

__device__ int64_t first_warp() { return (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp; }
__device__ int64_t num_warps() { return int64_t{gridDim.x} * blockDim.x / kWarp; }

template <class T>
__global__ void forward_kernel(QkNormRopeForward<T> args) {
  for (int64_t row = first_warp(); row < args.shape.num_rows(); row += num_warps())
    forward_row(args, row, threadIdx.x % kWarp, kWarp, WarpSum());
}

template <class T>
__global__ void backward_kernel(QkNormRopeBackward<T> args) {
  for (int64_t group = first_warp(); group < args.num_groups(); group += num_warps())
    backward_group(args, group, threadIdx.x % kWarp, kWarp, WarpSum());
}

/// Blocks for `warps` warps; the kernels' loops take what is beyond the limit.
unsigned num_blocks(int64_t warps) {
  constexpr int64_t kWarpsPerBlock = kThreads / kWarp, kMaxBlocks = 1 << 16;
  return static_cast<unsigned>(std::min((warps + kWarpsPerBlock - 1) / kWarpsPerBlock, kMaxBlocks));
}

template <class T>
cudaError_t launch(const QkNormRopeForward<T>& args, cudaStream_t stream) {
  if (args.shape.num_rows() == 0) return cudaSuccess;
  forward_kernel<<<num_blocks(args.shape.num_rows()), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const QkNormRopeBackward<T>& args, cudaStream_t stream) {
  if (args.shape.num_rows() == 0) return cudaSuccess;
  backward_kernel<<<num_blocks(args.num_groups()), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t qk_norm_rope_cuda(const QkNormRopeForward<float>& args, cudaStream_t stream) {
  return launch(args, stream);
}
cudaError_t qk_norm_rope_cuda(const QkNormRopeForward<Bf16>& args, cudaStream_t stream) {
  return launch(args, stream);
}
cudaError_t qk_norm_rope_backward_cuda(const QkNormRopeBackward<float>& args, cudaStream_t stream) {
  return launch(args, stream);
}
cudaError_t qk_norm_rope_backward_cuda(const QkNormRopeBackward<Bf16>& args, cudaStream_t stream) {
  return launch(args, stream);
}

}  // namespace flux::kernel
