// common/optim/rounding.h - bfloat16 bits from float32, to nearest or stochastically, the same source
// for CPU and CUDA. No LibTorch.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FLUX_OPTIM_INLINE __host__ __device__ __forceinline__
#else
#define FLUX_OPTIM_INLINE inline __attribute__((always_inline))
#endif

namespace flux {

FLUX_OPTIM_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
FLUX_OPTIM_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/// bfloat16 bits to float32, exactly, and back by rounding to nearest even; NaN stays NaN.
FLUX_OPTIM_INLINE float to_float(uint16_t bits) {
  return float_of(static_cast<uint32_t>(bits) << 16);
}
FLUX_OPTIM_INLINE float to_float(float value) { return value; }

FLUX_OPTIM_INLINE void round_to(float value, float* out) { *out = value; }
FLUX_OPTIM_INLINE void round_to(float value, uint16_t* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  *out = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40u : rounded);
}

/// The value as T keeps it.
template <class T>
FLUX_OPTIM_INLINE float rounded(float value) {
  T kept;
  round_to(value, &kept);
  return to_float(kept);
}

/// bfloat16 bits of `value`, rounded away from zero with the probability of the part cut off;
/// `random` is uniform in [0, 65536). NaN stays NaN, infinity stays, and a finite value never becomes
/// infinity. Source: sd-scripts' copy_stochastic_, which guards none of these.
FLUX_OPTIM_INLINE uint16_t round_stochastic(float value, uint32_t random) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu, sign = bits >> 16 & 0x8000u;
  uint32_t upper = (magnitude + random) >> 16;
  upper = upper > 0x7F7Fu ? 0x7F7Fu : upper;
  upper = magnitude >= 0x7F800000u ? 0x7F80u : upper;
  upper = magnitude > 0x7F800000u ? 0x7FC0u : upper;
  return static_cast<uint16_t>(sign | upper);
}

/// A stream of 16-bit numbers: number i is half i % 8 (lower halves first) of the Philox4x32-10 block
/// with counter (i / 8, high) and this key.
struct RoundingKey {
  uint32_t key[2];
  uint32_t high[2];
};

/// Philox4x32-10 in place, as philox4x32() of common/core/rng.h, in a form that vectorises.
FLUX_OPTIM_INLINE void philox_block(
    uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace flux
