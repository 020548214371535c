// common/optim/adamw8bit_math.h - AdamW8bit of one element between decoding and encoding, the same
// source for CPU and CUDA. No LibTorch.
#pragma once
#include <cmath>

#include "common/optim/blockwise8_math.h"

namespace flux {

struct AdamW8bitScalars {
  float decay;  // 1 - lr * weight_decay
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float step_size;    // lr / (1 - beta1^step)
  float correction2;  // sqrt(1 - beta2^step)
  float eps;
  float small_step;  // step_size * correction2: parameters whose states are float32
  float small_eps;   // eps * correction2
};

/// Decays the moments and takes the gradient in.
FLUX_OPTIM_INLINE void adamw8bit_moments(float g, float* m, float* v, const AdamW8bitScalars& s) {
  *m = *m * s.beta1 + s.one_minus_beta1 * g;
  *v = *v * s.beta2 + s.one_minus_beta2 * g * g;
}

FLUX_OPTIM_INLINE float adamw8bit_weight(float p, float m, float v, const AdamW8bitScalars& s) {
  return p * s.decay - s.step_size * m / (sqrtf(v) / s.correction2 + s.eps);
}

/// As bitsandbytes computes it where states are float32: equal but for rounding.
FLUX_OPTIM_INLINE float adamw8bit_small_weight(float p,
                                               float m,
                                               float v,
                                               const AdamW8bitScalars& s) {
  return p * s.decay - s.small_step * (m / (sqrtf(v) + s.small_eps));
}

}  // namespace flux
