// common/quant/quant_kernel.h - arithmetic of fp8 e4m3 and NF4, one text for the CPU and the CUDA
// kernels. No LibTorch: numbers and pointers.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FLUX_QUANT_FUNCTION __host__ __device__ __forceinline__
#else
#define FLUX_QUANT_FUNCTION inline __attribute__((always_inline))
#endif

namespace flux::kernel {

/// Bits of a bfloat16; a type of its own, so that no integer is taken for one.
struct Bf16Bits {
  uint16_t bits;
};

FLUX_QUANT_FUNCTION uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}
FLUX_QUANT_FUNCTION float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

/// Rounded to nearest, ties to even, whatever flags the compiler got.
FLUX_QUANT_FUNCTION float divided(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
FLUX_QUANT_FUNCTION float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FLUX_QUANT_FUNCTION float to_float(float value) { return value; }
FLUX_QUANT_FUNCTION float to_float(Bf16Bits value) { return float_of(uint32_t{value.bits} << 16); }

FLUX_QUANT_FUNCTION void store(float value, float* out) { *out = value; }
/// Nearest even; NaN becomes 0x7FC0.
FLUX_QUANT_FUNCTION void store(float value, Bf16Bits* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

/// |value| as bits: ordered as the numbers are, and NaN above all of them.
FLUX_QUANT_FUNCTION uint32_t magnitude(float value) { return bits_of(value) & 0x7FFFFFFFu; }

// --- fp8 e4m3: 1 sign, 4 exponent (bias 7), 3 mantissa bits; largest 448, no infinities, 0x7F and
// 0xFF are NaN.

/// To nearest, ties to even; beyond 448, infinity too, becomes 448; NaN becomes 0x7F or 0xFF.
FLUX_QUANT_FUNCTION uint8_t fp8_code(float value) {
  constexpr uint32_t kLargest = 0x43E00000u;         // 448
  constexpr uint32_t kSmallestNormal = 0x3C800000u;  // 2^-6
  constexpr float kStep = 16384.0f;  // 2^14: the last bit of a float from there on is 2^-9
  const uint32_t size = magnitude(value);
  const uint32_t clamped = size < kLargest ? size : kLargest;
  // 20 of 23 mantissa bits go, and the exponent's bias falls by 120
  const uint32_t normal = ((clamped + 0x7FFFFu + ((clamped >> 20) & 1u)) >> 20) - (120u << 3);
  // adding rounds to multiples of 2^-9, the numbers below 2^-6
  const uint32_t small = bits_of(float_of(clamped) + kStep) - 0x46800000u;
  const uint32_t finite = clamped < kSmallestNormal ? small : normal;
  const uint32_t code = size > 0x7F800000u ? 0x7Fu : finite;
  return static_cast<uint8_t>(code | (bits_of(value) >> 24 & 0x80u));
}

FLUX_QUANT_FUNCTION float fp8_value(uint8_t code) {
  const uint32_t size = code & 0x7Fu;
  const uint32_t normal = (size << 20) + (120u << 23);
  const uint32_t small = bits_of(product(static_cast<float>(static_cast<int32_t>(size)), 0x1p-9f));
  const uint32_t finite = size < 8u ? small : normal;
  return float_of((size == 0x7Fu ? 0x7FC00000u : finite) | (uint32_t{code} & 0x80u) << 24);
}

/// Of a block whose largest magnitude is `largest`: that becomes 448. Not finite if that is not.
FLUX_QUANT_FUNCTION float fp8_scale(float largest) {
  const float scale = divided(largest, 448.0f);
  return scale < 1e-12f ? 1e-12f : scale;
}

// --- NF4: a 4-bit number counts into a table of 16 values in [-1, 1], quantiles of the normal
// distribution. Source: Dettmers et al. 2023, arXiv:2305.14314; the values are those of
// bitsandbytes.

#define FLUX_NF4_VALUES                                                                            \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, \
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f,                    \
      0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f,      \
      0.5626170039176941f, 0.7229568362236023f, 1.0f

/// The number of the nearest value; the lower one of two that are as near.
FLUX_QUANT_FUNCTION uint8_t nf4_code(float value) {
  constexpr float kValues[16] = {FLUX_NF4_VALUES};
  uint32_t code = 0;
  for (int i = 0; i < 15; ++i) code += value > (kValues[i] + kValues[i + 1]) / 2 ? 1u : 0u;
  return static_cast<uint8_t>(code);
}

FLUX_QUANT_FUNCTION float nf4_value(uint32_t code) {
  constexpr float kValues[16] = {FLUX_NF4_VALUES};
  return kValues[code & 15u];
}

/// What a value of a block is multiplied with, so that the largest magnitude becomes 1.
FLUX_QUANT_FUNCTION float nf4_inverse(float largest) {
  return divided(1.0f, largest < 1e-38f ? 1e-38f : largest);
}

// --- one block of n values. `lanes` threads share it (32 on a GPU, 1 on a CPU), and `max` is the
// largest of a value over them.

template <class T, class Max>
FLUX_QUANT_FUNCTION float largest_magnitude(
    const T* values, int64_t n, int64_t lane, int64_t lanes, const Max& max) {
  uint32_t largest = 0;
  for (int64_t i = lane; i < n; i += lanes) {
    const uint32_t size = magnitude(to_float(values[i]));
    largest = size > largest ? size : largest;
  }
  return float_of(max(largest));
}

/// Returns the scale.
template <class T, class Max>
FLUX_QUANT_FUNCTION float fp8_quantize_block(
    const T* values, int64_t n, uint8_t* codes, int64_t lane, int64_t lanes, const Max& max) {
  const float scale = fp8_scale(largest_magnitude(values, n, lane, lanes, max));
  for (int64_t i = lane; i < n; i += lanes)
    codes[i] = fp8_code(divided(to_float(values[i]), scale));
  return scale;
}

template <class T>
FLUX_QUANT_FUNCTION void fp8_dequantize_block(
    const uint8_t* codes, float scale, int64_t n, T* out, int64_t lane, int64_t lanes) {
  for (int64_t i = lane; i < n; i += lanes) store(product(fp8_value(codes[i]), scale), out + i);
}

/// codes [ceil(n / 2)]; of an odd n the last code's low half is that of zero. Returns the scale.
/// `whole`: not the short block at the end, which bitsandbytes divides where it multiplies the
/// others with the inverse.
template <class T, class Max>
FLUX_QUANT_FUNCTION float nf4_quantize_block(const T* values,
                                             int64_t n,
                                             bool whole,
                                             uint8_t* codes,
                                             int64_t lane,
                                             int64_t lanes,
                                             const Max& max) {
  float largest = largest_magnitude(values, n, lane, lanes, max);
  if (!whole && largest < 1e-38f) largest = 1e-38f;
  const float inverse = nf4_inverse(largest);
  const auto code = [&](float value) {
    return nf4_code(whole ? product(value, inverse) : divided(value, largest));
  };
  for (int64_t pair = lane; pair < n / 2; pair += lanes)
    codes[pair] = static_cast<uint8_t>(code(to_float(values[2 * pair])) << 4 |
                                       code(to_float(values[2 * pair + 1])));
  if (lane == 0 && n % 2 != 0)
    codes[n / 2] = static_cast<uint8_t>(code(to_float(values[n - 1])) << 4 | nf4_code(0));
  return largest;
}

/// The 16 values of a block come from `value_of`: a GPU works them out, a CPU has a table.
template <class T, class ValueOf>
FLUX_QUANT_FUNCTION void nf4_dequantize_block(
    const uint8_t* codes, int64_t n, T* out, int64_t lane, int64_t lanes, const ValueOf& value_of) {
  for (int64_t pair = lane; pair < n / 2; pair += lanes) {
    out[2 * pair] = value_of(codes[pair] >> 4);
    out[2 * pair + 1] = value_of(codes[pair] & 15u);
  }
  if (lane == 0 && n % 2 != 0) out[n - 1] = value_of(codes[n / 2] >> 4);
}

template <class T>
FLUX_QUANT_FUNCTION T nf4_scaled(uint32_t code, float scale) {
  T out;
  store(product(nf4_value(code), scale), &out);
  return out;
}

/// Where the blocks of a weight lie: rows of `in` values in blocks of `block`, the last of a row
/// being as long as is left. NF4 reads a weight as one row.
struct QuantBlocks {
  int64_t rows, in, block;

  FLUX_QUANT_FUNCTION int64_t per_row() const { return (in + block - 1) / block; }
  FLUX_QUANT_FUNCTION int64_t count() const { return rows * per_row(); }
  FLUX_QUANT_FUNCTION int64_t first(int64_t index) const {
    return index / per_row() * in + index % per_row() * block;
  }
  FLUX_QUANT_FUNCTION int64_t length(int64_t index) const {
    const int64_t left = in - index % per_row() * block;
    return left < block ? left : block;
  }
};

}  // namespace flux::kernel
