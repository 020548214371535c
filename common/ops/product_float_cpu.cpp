// common/ops/product_float_cpu.cpp - bfloat16 products where the CPU has no instructions for them. No LibTorch, so that
// it has its own compiler flags: a version for AVX-512, AVX2 and plain CPUs each.
#include <algorithm>

#include "common/ops/pack.h"
#include "common/ops/product_cpu.h"

// An address sanitizer is not ready yet when the loader picks a version.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define FLUX_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FLUX_CLONES
#endif

namespace flux::kernel {
namespace {

constexpr int64_t kTileRows = 6;  // with a pack each, they and b fill the 16 registers of AVX2
static_assert(kFloatRows % kTileRows == 0 && kFloatColumns == kPack);

const Bf16Bits* bits(const uint16_t* data) { return reinterpret_cast<const Bf16Bits*>(data); }

}  // namespace

FLUX_CLONES void multiply_floats(const float* a,
                                 const float* b,
                                 int64_t rows,
                                 int64_t depth,
                                 bool add,
                                 float* sums,
                                 int64_t sums_row) {
  for (int64_t first = 0; first < rows; first += kTileRows) {
    const float* tile = a + first * depth;
    Pack total[kTileRows] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const Pack column = load(b + k * kFloatColumns);
#pragma GCC unroll 6
      for (int64_t i = 0; i < kTileRows; ++i) total[i] += tile[i * depth + k] * column;
    }
    for (int64_t i = 0; i < std::min(kTileRows, rows - first); ++i) {
      float* out = sums + (first + i) * sums_row;
      save(add ? load(out) + total[i] : total[i], out);
    }
  }
}

FLUX_CLONES void widen_rows(
    const Bf16Matrix& a, int64_t m, int64_t rows, int64_t k, int64_t depth, float* out) {
  const Bf16Bits* from = bits(a.data) + m * a.row + k * a.column;
  if (a.column == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t x = 0; x < depth; ++x) out[i * depth + x] = to_float(from[i * a.row + x]);
  } else {
    for (int64_t x = 0; x < depth; ++x)
      for (int64_t i = 0; i < rows; ++i)
        out[i * depth + x] = to_float(from[i * a.row + x * a.column]);
  }
  std::fill(out + rows * depth, out + kFloatRows * depth, 0.0f);
}

FLUX_CLONES void widen_columns(
    const Bf16Matrix& b, int64_t k, int64_t depth, int64_t n, float* out) {
  const Bf16Bits* from = bits(b.data) + k * b.row + n * b.column;
  const int64_t columns = std::min(kFloatColumns, b.columns - n);
  if (b.column == 1) {
    for (int64_t x = 0; x < depth; ++x)
      for (int64_t j = 0; j < columns; ++j)
        out[x * kFloatColumns + j] = to_float(from[x * b.row + j]);
  } else {
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t x = 0; x < depth; ++x)
        out[x * kFloatColumns + j] = to_float(from[x * b.row + j * b.column]);
  }
  for (int64_t x = 0; columns < kFloatColumns && x < depth; ++x)
    std::fill(out + x * kFloatColumns + columns, out + (x + 1) * kFloatColumns, 0.0f);
}

}  // namespace flux::kernel
