#include "common/quant/quant_cpu.h"

#include <cstring>

// An address sanitizer is not ready yet when the loader picks a version.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define FLUX_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define FLUX_CLONES
#endif

namespace flux::kernel {
namespace {

// Part of the version it is called from: by itself a lambda would be of the plainest one.
#define FLUX_INLINE __attribute__((always_inline))
constexpr auto kAlone = [](uint32_t value) FLUX_INLINE { return value; };
constexpr int64_t kUsual = 64;

/// Calls run(n, first): for the usual block with a constant, so that the compiler unrolls it.
template <class Run>
FLUX_QUANT_FUNCTION void for_blocks(const QuantBlocks& blocks,
                                    int64_t first,
                                    int64_t last,
                                    const Run& run) {
  const QuantBlocks b = blocks;
  int64_t in_row = first % b.per_row();
  int64_t at = b.first(first);
  for (int64_t i = first; i < last; ++i) {
    const int64_t left = b.in - in_row * b.block, n = left < b.block ? left : b.block;
    run(i, at, n);
    at += n;
    in_row = in_row + 1 == b.per_row() ? 0 : in_row + 1;
  }
}

// Memory of its own tells the compiler that nothing overlaps.
template <class T>
FLUX_QUANT_FUNCTION float fp8_quantize_usual(const T* values, uint8_t* codes) {
  T x[kUsual];
  uint8_t c[kUsual];
  memcpy(x, values, sizeof x);
  const float scale = fp8_quantize_block(x, kUsual, c, 0, 1, kAlone);
  memcpy(codes, c, sizeof c);
  return scale;
}
template <class T>
FLUX_QUANT_FUNCTION void fp8_dequantize_usual(const uint8_t* codes, float scale, T* out) {
  T x[kUsual];
  uint8_t c[kUsual];
  memcpy(c, codes, sizeof c);
  fp8_dequantize_block(c, scale, kUsual, x, 0, 1);
  memcpy(out, x, sizeof x);
}
template <class T>
FLUX_QUANT_FUNCTION float nf4_quantize_usual(const T* values, uint8_t* codes) {
  T x[kUsual];
  uint8_t c[kUsual / 2];
  memcpy(x, values, sizeof x);
  const float scale = nf4_quantize_block(x, kUsual, true, c, 0, 1, kAlone);
  memcpy(codes, c, sizeof c);
  return scale;
}
template <class T>
FLUX_QUANT_FUNCTION void nf4_dequantize(const uint8_t* codes, float scale, int64_t n, T* out) {
  T table[16];
  for (uint32_t code = 0; code < 16; ++code) table[code] = nf4_scaled<T>(code, scale);
  const auto value_of = [&](uint32_t code) FLUX_INLINE { return table[code]; };
  nf4_dequantize_block(codes, n, out, 0, 1, value_of);
}
template <class T>
FLUX_QUANT_FUNCTION void nf4_dequantize_usual(const uint8_t* codes, float scale, T* out) {
  T x[kUsual];
  uint8_t c[kUsual / 2];
  memcpy(c, codes, sizeof c);
  nf4_dequantize(c, scale, kUsual, x);
  memcpy(out, x, sizeof x);
}

}  // namespace

// A template would have one version only.
#define FLUX_QUANT_KERNELS(T)                                                                 \
  FLUX_CLONES void fp8_quantize_cpu(const QuantBlocks& blocks,                                \
                                    int64_t first,                                            \
                                    int64_t last,                                             \
                                    const T* values,                                          \
                                    uint8_t* codes,                                           \
                                    float* scales) {                                          \
    for_blocks(blocks, first, last, [=](int64_t i, int64_t at, int64_t n) FLUX_INLINE {       \
      scales[i] = n == kUsual ? fp8_quantize_usual(values + at, codes + at)                   \
                              : fp8_quantize_block(values + at, n, codes + at, 0, 1, kAlone); \
    });                                                                                       \
  }                                                                                           \
  FLUX_CLONES void fp8_dequantize_cpu(const QuantBlocks& blocks,                              \
                                      int64_t first,                                          \
                                      int64_t last,                                           \
                                      const uint8_t* codes,                                   \
                                      const float* scales,                                    \
                                      T* out) {                                               \
    for_blocks(blocks, first, last, [=](int64_t i, int64_t at, int64_t n) FLUX_INLINE {       \
      n == kUsual ? fp8_dequantize_usual(codes + at, scales[i], out + at)                     \
                  : fp8_dequantize_block(codes + at, scales[i], n, out + at, 0, 1);           \
    });                                                                                       \
  }                                                                                           \
  FLUX_CLONES void nf4_quantize_cpu(const QuantBlocks& blocks,                                \
                                    int64_t first,                                            \
                                    int64_t last,                                             \
                                    const T* values,                                          \
                                    uint8_t* codes,                                           \
                                    float* scales) {                                          \
    const int64_t whole = blocks.block;                                                       \
    for_blocks(blocks, first, last, [=](int64_t i, int64_t at, int64_t n) FLUX_INLINE {       \
      scales[i] =                                                                             \
          n == kUsual && n == whole                                                           \
              ? nf4_quantize_usual(values + at, codes + at / 2)                               \
              : nf4_quantize_block(values + at, n, n == whole, codes + at / 2, 0, 1, kAlone); \
    });                                                                                       \
  }                                                                                           \
  FLUX_CLONES void nf4_dequantize_cpu(const QuantBlocks& blocks,                              \
                                      int64_t first,                                          \
                                      int64_t last,                                           \
                                      const uint8_t* codes,                                   \
                                      const float* scales,                                    \
                                      T* out) {                                               \
    for_blocks(blocks, first, last, [=](int64_t i, int64_t at, int64_t n) FLUX_INLINE {       \
      n == kUsual ? nf4_dequantize_usual(codes + at / 2, scales[i], out + at)                 \
                  : nf4_dequantize(codes + at / 2, scales[i], n, out + at);                   \
    });                                                                                       \
  }
FLUX_QUANT_KERNELS(float)
FLUX_QUANT_KERNELS(Bf16Bits)
#undef FLUX_QUANT_KERNELS

}  // namespace flux::kernel
