// common/optim/elements_math.h - updates that look at one element at a time, the same source for CPU and
// CUDA. No LibTorch.
#pragma once
#include <cmath>

#include "common/optim/adamw_math.h"
#include "common/optim/rounding.h"

namespace flux {

struct LionScalars {
  float decay;  // 1 - lr * weight_decay
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float learning_rate;
};

/// T as of adamw_values(); torch rounds the factor of an addition, not that of a multiplication.
template <class T>
FLUX_OPTIM_INLINE void lion_values(float* p, float g, float* m, const LionScalars& s) {
  const float mixed = rounded<T>(rounded<T>(*m * s.beta1) + rounded<T>(s.one_minus_beta1) * g);
  float sign = mixed;  // NaN stays, and so does 0
  sign = mixed > 0 ? 1.0f : sign;
  sign = mixed < 0 ? -1.0f : sign;
  *p = rounded<T>(rounded<T>(*p * s.decay) - rounded<T>(s.learning_rate) * sign);
  *m = rounded<T>(rounded<T>(*m * s.beta2) + rounded<T>(s.one_minus_beta2) * g);
}

struct SgdScalars {
  float learning_rate, momentum, weight_decay;
  float nesterov;  // 1 or 0
};

FLUX_OPTIM_INLINE void sgd_values(float* p, float g, float* m, const SgdScalars& s) {
  const float d = g + s.weight_decay * *p;
  *m = *m * s.momentum + d;
  *p -= s.learning_rate * (s.nesterov != 0 ? d + s.momentum * *m : *m);
}

struct ScheduleFreeScalars {
  float beta2, one_minus_beta2;
  float correction2;  // 1 - beta2^step
  float eps, weight_decay;
  float towards_z;  // the weight of this step in the average
  float learning_rate;
  float y_step;  // learning_rate * (beta1 * (1 - towards_z) - 1)
  float first;   // 1 in step 1, when z is the weights
};

FLUX_OPTIM_INLINE float mix(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

/// y: the weights that are trained.
FLUX_OPTIM_INLINE void schedule_free_values(
    float* y, float g, float* z, float* v, const ScheduleFreeScalars& s) {
  const float before = s.first != 0 ? *y : *z;
  *v = *v * s.beta2 + s.one_minus_beta2 * g * g;
  const float step = g / (sqrtf(*v / s.correction2) + s.eps) + s.weight_decay * *y;
  *y = mix(*y, before, s.towards_z) + s.y_step * step;
  *z = before - s.learning_rate * step;
}

struct ProdigyScalars {
  float beta1, gradient1;  // m <- beta1 m + gradient1 g
  float beta2, gradient2;
  float beta3, gradient3;
  float eps;            // times d
  float learning_rate;  // with d and the bias correction
  float decay;          // -weight_decay * learning_rate
  float first;          // 1 in step 1, when p0 is the weights
};

/// Elements of a part whose two sums are made apart, and then added in the parts' order.
constexpr int64_t kProdigyPart = 1 << 14;
inline int64_t prodigy_num_parts(int64_t n) { return (n + kProdigyPart - 1) / kProdigyPart; }
/// Doubles of scratch: two sums a part, then the two totals.
inline int64_t prodigy_num_sums(int64_t n) { return 2 * prodigy_num_parts(n) + 2; }

/// What is seen of an element before any weight changes; returns g (p0 - p).
FLUX_OPTIM_INLINE float prodigy_observed(
    float p, float g, float* m, float* v, float* sum, float* p0, const ProdigyScalars& s) {
  *p0 = s.first != 0 ? p : *p0;
  *m = *m * s.beta1 + s.gradient1 * g;
  *v = *v * s.beta2 + s.gradient2 * g * g;
  *sum = *sum * s.beta3 + s.gradient3 * g;
  return g * (*p0 - p);
}

FLUX_OPTIM_INLINE void prodigy_values(float* p, float m, float v, const ProdigyScalars& s) {
  *p += s.decay * *p;
  *p -= s.learning_rate * m / (sqrtf(v) + s.eps);
}

struct EmaScalars {
  float one_minus_decay;
};

FLUX_OPTIM_INLINE void ema_values(float* shadow, float weight, const EmaScalars& s) {
  *shadow -= s.one_minus_decay * (*shadow - weight);
}

}  // namespace flux
