// common/ops/pack.h - several float32 numbers at a time, and rows read and written in such packs: one text for the CPU
// (a vector of 16, which the compiler spreads over the registers there are) and for CUDA (4 numbers of a thread). No
// LibTorch.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/quant/quant_kernel.h"

#define FLUX_PACK_FUNCTION FLUX_QUANT_FUNCTION
// Part of the version of a function it is called from: by itself a lambda would be of the plainest one.
#ifdef __CUDACC__
#define FLUX_PACK_LAMBDA
#else
#define FLUX_PACK_LAMBDA __attribute__((always_inline))
#endif

namespace flux::kernel {

#ifdef __CUDACC__

struct Pack {
  float v[4];
};
inline constexpr int kPack = 4;

#define FLUX_PACK_OPERATOR(op)                                                           \
  FLUX_PACK_FUNCTION Pack operator op(Pack a, Pack b) {                                  \
    return {a.v[0] op b.v[0], a.v[1] op b.v[1], a.v[2] op b.v[2], a.v[3] op b.v[3]};     \
  }                                                                                      \
  FLUX_PACK_FUNCTION Pack operator op(Pack a, float b) { return a op Pack{b, b, b, b}; } \
  FLUX_PACK_FUNCTION Pack operator op(float a, Pack b) { return Pack{a, a, a, a} op b; }
FLUX_PACK_OPERATOR(+)
FLUX_PACK_OPERATOR(-)
FLUX_PACK_OPERATOR(*)
FLUX_PACK_OPERATOR(/)
#undef FLUX_PACK_OPERATOR

FLUX_PACK_FUNCTION Pack exp_of(Pack x) {
  return {expf(x.v[0]), expf(x.v[1]), expf(x.v[2]), expf(x.v[3])};
}
FLUX_PACK_FUNCTION Pack sqrt_of(Pack x) {
  return {sqrtf(x.v[0]), sqrtf(x.v[1]), sqrtf(x.v[2]), sqrtf(x.v[3])};
}
/// 1, -1, or 0 for zero and NaN.
FLUX_PACK_FUNCTION Pack sign_of(Pack x) {
  Pack sign;
  for (int i = 0; i < kPack; ++i) sign.v[i] = x.v[i] > 0 ? 1.0f : x.v[i] < 0 ? -1.0f : 0.0f;
  return sign;
}
FLUX_PACK_FUNCTION float sum_of(Pack x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }
FLUX_PACK_FUNCTION void set(Pack* x, int i, float value) { x->v[i] = value; }
FLUX_PACK_FUNCTION float get(Pack x, int i) { return x.v[i]; }

template <class T>
FLUX_PACK_FUNCTION Pack load(const T* from) {
  return {to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
}
template <class T>
FLUX_PACK_FUNCTION void save(Pack x, T* to) {
  for (int i = 0; i < kPack; ++i) store(x.v[i], to + i);
}

#else

// Packs are passed between functions that are always inlined: how is of no matter.
#pragma GCC diagnostic ignored "-Wpsabi"

using Pack = float __attribute__((vector_size(64)));
using PackBits = uint32_t __attribute__((vector_size(64)));
using PackHalves = uint16_t __attribute__((vector_size(32)));
inline constexpr int kPack = 16;

FLUX_PACK_FUNCTION Pack load(const float* from) {
  Pack x;
  memcpy(&x, from, sizeof x);
  return x;
}
FLUX_PACK_FUNCTION Pack load(const Bf16Bits* from) {
  PackHalves halves;
  memcpy(&halves, from, sizeof halves);
  return reinterpret_cast<Pack>(__builtin_convertvector(halves, PackBits) << 16);
}
FLUX_PACK_FUNCTION void save(Pack x, float* to) { memcpy(to, &x, sizeof x); }
/// Nearest even; NaN becomes 0x7FC0.
FLUX_PACK_FUNCTION void save(Pack x, Bf16Bits* to) {
  const PackBits bits = reinterpret_cast<PackBits>(x);
  PackBits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const PackBits is_nan = reinterpret_cast<PackBits>(x != x);
  rounded = (is_nan & 0x7FC0u) | (~is_nan & rounded);
  const PackHalves halves = __builtin_convertvector(rounded, PackHalves);
  memcpy(to, &halves, sizeof halves);
}

/// e^x to 1e-7 of its value; 0 below -87, at most e^88.
FLUX_PACK_FUNCTION Pack exp_of(Pack x) {
  // x = n log 2 + r with |r| <= log 2 / 2; adding 1.5 * 2^23 rounds to the nearest whole number
  constexpr float kRound = 12582912.0f;
  const Pack low = Pack{} - 87.3f, high = Pack{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Pack shifted = x * 1.44269504f + kRound;
  const Pack n = shifted - kRound;
  const Pack r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Pack p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const PackBits power = (reinterpret_cast<PackBits>(shifted) - 0x4B400000u + 127u) << 23;
  return p * reinterpret_cast<Pack>(power);
}
FLUX_PACK_FUNCTION Pack sqrt_of(Pack x) {
  float v[kPack];
  memcpy(v, &x, sizeof v);
  for (int i = 0; i < kPack; ++i) v[i] = sqrtf(v[i]);
  memcpy(&x, v, sizeof v);
  return x;
}
/// 1, -1, or 0 for zero and NaN.
FLUX_PACK_FUNCTION Pack sign_of(Pack x) {
  const Pack zero{}, one = zero + 1.0f;
  return (x > zero ? one : zero) - (x < zero ? one : zero);
}
FLUX_PACK_FUNCTION float sum_of(Pack x) {
  float v[kPack];
  memcpy(v, &x, sizeof v);
  for (int width = kPack / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}
FLUX_PACK_FUNCTION void set(Pack* x, int i, float value) { (*x)[i] = value; }
FLUX_PACK_FUNCTION float get(Pack x, int i) { return x[i]; }

#endif

FLUX_PACK_FUNCTION Pack zeros() { return Pack{}; }

/// How much of a pack lies in the row: all, or `count` numbers. What is read beyond is zero.
struct Whole {};
struct Part {
  int count;
};

template <class T>
FLUX_PACK_FUNCTION Pack load(const T* from, Whole) {
  return load(from);
}
template <class T>
FLUX_PACK_FUNCTION Pack load(const T* from, Part part) {
  Pack x = zeros();
  for (int i = 0; i < part.count; ++i) set(&x, i, to_float(from[i]));
  return x;
}
template <class T>
FLUX_PACK_FUNCTION void save(Pack x, T* to, Whole) {
  save(x, to);
}
template <class T>
FLUX_PACK_FUNCTION void save(Pack x, T* to, Part part) {
  for (int i = 0; i < part.count; ++i) store(get(x, i), to + i);
}
/// Zero where there is no number of the row.
FLUX_PACK_FUNCTION Pack only(Pack x, Whole) { return x; }
FLUX_PACK_FUNCTION Pack only(Pack x, Part part) {
  for (int i = part.count; i < kPack; ++i) set(&x, i, 0.0f);
  return x;
}

/// Calls run(i, part) for the packs of a row of n numbers that are thread `lane`'s of `lanes`.
template <class Run>
FLUX_PACK_FUNCTION void for_packs(int64_t n, int64_t lane, int64_t lanes, const Run& run) {
  int64_t i = lane * kPack;
  for (; i + kPack <= n; i += lanes * kPack) run(i, Whole());
  if (i < n) run(i, Part{static_cast<int>(n - i)});
}

}  // namespace flux::kernel
