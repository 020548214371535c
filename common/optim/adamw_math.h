// common/optim/adamw_math.h - AdamW of one element, the same source for CPU and CUDA. No LibTorch.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FLUX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLUX_HOST_DEVICE inline
#endif

namespace flux {

/// What all elements of an update share, computed in double and rounded once.
struct AdamWScalars {
  float decay;  // 1 - lr * weight_decay
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;    // lr / (1 - beta1^step)
  float correction2;  // sqrt(1 - beta2^step)
  float eps;
};

/// bfloat16 bits to float32, exactly, and back by rounding to nearest even; NaN stays NaN.
FLUX_HOST_DEVICE float to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}
FLUX_HOST_DEVICE float to_float(float value) { return value; }

FLUX_HOST_DEVICE void round_to(float value, float* out) { *out = value; }
FLUX_HOST_DEVICE void round_to(float value, uint16_t* out) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  *out = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40u : rounded);
}

/// The value as T keeps it.
template <class T>
FLUX_HOST_DEVICE float rounded(float value) {
  T kept;
  round_to(value, &kept);
  return to_float(kept);
}

/// T is float, or uint16_t for bfloat16: then every operation is rounded, as torch.optim.AdamW does
/// with such weights.
template <class T>
FLUX_HOST_DEVICE void adamw_element(
    T* parameter, const T* gradient, T* exp_avg, T* exp_avg_sq, const AdamWScalars& s) {
  const float g = to_float(*gradient);
  float m = to_float(*exp_avg), v = to_float(*exp_avg_sq), p = to_float(*parameter);
  p = rounded<T>(p * s.decay);
  m = rounded<T>(m + s.one_minus_beta1 * (g - m));
  v = rounded<T>(rounded<T>(v * s.beta2) + s.one_minus_beta2 * g * g);
  const float root = rounded<T>(rounded<T>(sqrtf(v)) / s.correction2);
  p -= s.step_size * m / rounded<T>(root + s.eps);
  round_to(p, parameter);
  round_to(m, exp_avg);
  round_to(v, exp_avg_sq);
}

}  // namespace flux
