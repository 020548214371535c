// common/optim/adamw_math.h - AdamW of one element, the same source for CPU and CUDA. No LibTorch.
#pragma once
#include <cmath>

#include "common/optim/rounding.h"

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

/// T is float, or uint16_t for bfloat16: then every operation is rounded, as torch.optim.AdamW does
/// with such weights.
template <class T>
FLUX_OPTIM_INLINE void adamw_values(
    float* parameter, float g, float* exp_avg, float* exp_avg_sq, const AdamWScalars& s) {
  const float m = rounded<T>(*exp_avg + s.one_minus_beta1 * (g - *exp_avg));
  const float v = rounded<T>(rounded<T>(*exp_avg_sq * s.beta2) + s.one_minus_beta2 * g * g);
  const float root = rounded<T>(rounded<T>(sqrtf(v)) / s.correction2);
  *parameter =
      rounded<T>(rounded<T>(*parameter * s.decay) - s.step_size * m / rounded<T>(root + s.eps));
  *exp_avg = m;
  *exp_avg_sq = v;
}

/// The same in memory.
template <class T>
FLUX_OPTIM_INLINE void adamw_element(
    T* parameter, const T* gradient, T* exp_avg, T* exp_avg_sq, const AdamWScalars& s) {
  float p = to_float(*parameter), m = to_float(*exp_avg), v = to_float(*exp_avg_sq);
  adamw_values<T>(&p, to_float(*gradient), &m, &v, s);
  round_to(p, parameter);
  round_to(m, exp_avg);
  round_to(v, exp_avg_sq);
}

}  // namespace flux
