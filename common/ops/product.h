// common/ops/product.h - matrix products in memory that is known beforehand.
//
// bfloat16 on a CPU has kernels of its own here: LibTorch's go to oneDNN, whose scratch depends on the CPU and the shape
// and is as large as an operand. Everything else is at::mm, whose float32 kernels need none.
#pragma once
#include <ATen/core/Tensor.h>

namespace flux {

/// scale * (a b) + c d + bias, summed in float32 and rounded once where the project's kernels run.
///
///   a     [M, K], b [K, N]: float32|bfloat16; in each one stride is 1 (a transposed view is not copied)
///   c     [M, R], d [R, N]: the same for a second product, or undefined
///   bias  [N], or undefined
struct Product {
  at::Tensor a, b;
  at::Tensor c{}, d{};
  at::Tensor bias{};
  double scale = 1;
};

/// Into `out` [M, N], contiguous. The bits do not depend on the number of threads. Scratch is allocated on the device of
/// `out` under MemoryCause::kKernelScratch, on Meta as on the CPU: see product_scratch_bytes. Not differentiable.
void multiply(const Product& product, const at::Tensor& out);

/// Bytes of scratch of a product on the CPU with `threads` threads.
///   a_transposed  a is the transposed view of a matrix
int64_t product_scratch_bytes(
    int64_t m, int64_t k, int64_t n, c10::ScalarType type, bool a_transposed, int64_t threads);

}  // namespace flux
