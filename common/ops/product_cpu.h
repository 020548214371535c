// common/ops/product_cpu.h - the bfloat16 product on a CPU: blocks are packed into scratch of the caller, then multiplied
// by LibTorch's micro-kernel where the CPU multiplies bfloat16 (AMX, AVX512_BF16), else as float32. For product.cpp.
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

/// kPairs: of neighbours in K, by LibTorch's micro-kernel; kFloat: widened, by the project's own.
enum class Bf16Kernel { kPairs, kFloat };
/// Which one this CPU runs; ONEDNN_MAX_CPU_ISA limits it as it limits LibTorch.
Bf16Kernel bf16_kernel();
/// For tests: kFloat although the CPU could do better, or again what it can.
void limit_bf16_kernel(bool limited);

/// How the work is cut, and so what scratch it takes.
struct Bf16Plan {
  static constexpr int64_t kColumns = 256;  // of b and out, in a task
  static constexpr int64_t kRows = 1536;    // of a and out at a time

  /// `dense`: a is one whose rows kPairs can read: they are dense and K is even.
  Bf16Plan(
      Bf16Kernel kernel, int64_t m, int64_t k, int64_t n, int64_t r, bool dense, int64_t threads);

  Bf16Kernel kernel;
  bool pack_a;        // a is copied with its rows dense
  int64_t depth;      // of a and b between two additions to float32 sums
  int64_t rows;       // of a chunk
  int64_t width;      // of a task
  int64_t row_parts;  // of a chunk, so that every thread has work
  int64_t part_rows;
  int64_t packed_a, packed, sums;  // bytes: of all, of a thread, of a thread
  int64_t bytes(int64_t threads) const { return packed_a + threads * (packed + sums); }
};

/// `scratch` has plan.bytes(threads). The bits do not depend on `threads`.
void multiply_bf16(const Bf16Product& product,
                   const Bf16Plan& plan,
                   int64_t threads,
                   void* scratch);

// The micro-kernel of kFloat, on blocks of kFloatRows rows and panels of kFloatColumns columns.
inline constexpr int64_t kFloatRows = 48, kFloatColumns = 16;
/// sums [rows, ...] (+)= a [kFloatRows, depth] b [depth, kFloatColumns]; `rows` of a are stored.
void multiply_floats(const float* a,
                     const float* b,
                     int64_t rows,
                     int64_t depth,
                     bool add,
                     float* sums,
                     int64_t sums_row);
/// Rows [m, m + rows) and columns [k, k + depth) of a, and zeros up to kFloatRows.
void widen_rows(const Bf16Matrix& a, int64_t m, int64_t rows, int64_t k, int64_t depth, float* out);
/// Rows [k, k + depth) and columns [n, n + kFloatColumns) of b; beyond the matrix there are zeros.
void widen_columns(const Bf16Matrix& b, int64_t k, int64_t depth, int64_t n, float* out);

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
