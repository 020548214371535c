// common/ops/product_cpu.h - the bfloat16 product on a CPU with AMX: blocks are packed into scratch of the caller, then
// multiplied by LibTorch's micro-kernel. For product.cpp.
#pragma once
#include <cstdint>

namespace flux::kernel {

/// A bfloat16 matrix as bits: element (i, j) lies at i * row + j * column, one of the two being 1.
struct Bf16Matrix {
  const uint16_t* data = nullptr;
  int64_t rows = 0, columns = 0, row = 0, column = 0;
};

struct Bf16Product {
  Bf16Matrix a, b, c, d;           // c and d: without rows if there is no second product
  const uint16_t* bias = nullptr;  // [N], or null
  float scale = 1;
  uint16_t* out = nullptr;  // [M, N] contiguous
};

/// How the work is cut, and so what scratch it takes.
struct Bf16Plan {
  static constexpr int64_t kColumns = 128;  // of b and out, in a task
  static constexpr int64_t kDepth = 1536;   // of a and b between two additions to float32 sums
  static constexpr int64_t kRows = 1536;    // of a and out at a time

  Bf16Plan(int64_t m, int64_t k, int64_t n, int64_t r, bool pack_a, int64_t threads);

  bool pack_a;        // a is copied with its rows dense: it is transposed, or its K is odd
  int64_t rows;       // of a chunk
  int64_t width;      // of a task
  int64_t row_parts;  // of a chunk, so that every thread has work
  int64_t part_rows;
  int64_t packed_a, packed_b, sums;  // bytes: of all, of a thread, of a thread
  int64_t bytes(int64_t threads) const { return packed_a + threads * (packed_b + sums); }
};

/// Whether this CPU has what the kernels need.
bool multiplies_bf16();
void multiply_bf16(const Bf16Product& product,
                   const Bf16Plan& plan,
                   int64_t threads,
                   void* scratch);

/// Rows [first, last) of the transposed of `from` [columns, rows], whose rows lie `stride` apart: to [rows, columns].
void transpose_cpu(const uint16_t* from,
                   int64_t stride,
                   int64_t columns,
                   int64_t first,
                   int64_t last,
                   uint16_t* to);
void transpose_cpu(
    const float* from, int64_t stride, int64_t columns, int64_t first, int64_t last, float* to);

}  // namespace flux::kernel
