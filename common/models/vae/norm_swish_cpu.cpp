#include "common/models/vae/norm_swish_cpu.h"

#include <bit>

// An address sanitizer is not ready yet when the loader picks a version.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define FLUX_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FLUX_CLONES
#endif
#define FLUX_INLINE inline __attribute__((always_inline))

namespace flux::vae {
namespace {

FLUX_INLINE float load(float x) { return x; }
FLUX_INLINE float load(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

FLUX_INLINE void store(float x, float* out) { *out = x; }
/// Rounds to nearest even. The NaNs that arithmetic makes stay NaN.
FLUX_INLINE void store(float x, uint16_t* out) {
  const auto bits = std::bit_cast<uint32_t>(x);
  *out = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// e^x: 2^n e^r with |r| <= ln(2) / 2. Source of the polynomial: Cephes (Moshier), expf. Clamped to
/// +-60, where swish is 0 or x to 25 digits, and short of where a quotient would be subnormal,
/// which costs 100 cycles.
FLUX_INLINE float exponential(float x) {
  x = x < -60.0f ? -60.0f : x;
  x = x > 60.0f ? 60.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float power = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return (p * r * r + r + 1.0f) * power;
}

template <class T>
FLUX_INLINE void add_moments(const T* __restrict x,
                             int64_t pixels,
                             int64_t channels,
                             const float* __restrict shift,
                             float* __restrict sum,
                             float* __restrict square) {
  for (int64_t i = 0; i < pixels; ++i, x += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float d = load(x[c]) - shift[c];
      sum[c] += d;
      square[c] += d * d;
    }
  }
}

template <class T>
FLUX_INLINE void norm_swish(const T* __restrict x,
                            int64_t pixels,
                            int64_t channels,
                            const float* __restrict mean,
                            const float* __restrict scale,
                            const float* __restrict bias,
                            T* __restrict out) {
  for (int64_t i = 0; i < pixels; ++i, x += channels, out += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float y = (load(x[c]) - mean[c]) * scale[c] + bias[c];
      store(y / (1.0f + exponential(-y)), out + c);
    }
  }
}

}  // namespace

FLUX_CLONES void add_moments_cpu(const float* x,
                                 int64_t pixels,
                                 int64_t channels,
                                 const float* shift,
                                 float* sum,
                                 float* square) {
  add_moments(x, pixels, channels, shift, sum, square);
}
FLUX_CLONES void add_moments_cpu(const uint16_t* x,
                                 int64_t pixels,
                                 int64_t channels,
                                 const float* shift,
                                 float* sum,
                                 float* square) {
  add_moments(x, pixels, channels, shift, sum, square);
}
FLUX_CLONES void norm_swish_cpu(const float* x,
                                int64_t pixels,
                                int64_t channels,
                                const float* mean,
                                const float* scale,
                                const float* bias,
                                float* out) {
  norm_swish(x, pixels, channels, mean, scale, bias, out);
}
FLUX_CLONES void norm_swish_cpu(const uint16_t* x,
                                int64_t pixels,
                                int64_t channels,
                                const float* mean,
                                const float* scale,
                                const float* bias,
                                uint16_t* out) {
  norm_swish(x, pixels, channels, mean, scale, bias, out);
}

}  // namespace flux::vae
