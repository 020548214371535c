#include "common/optim/adamw_cpu.h"

// An address sanitizer is not ready yet when the loader picks a version.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define FLUX_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FLUX_CLONES
#endif

namespace flux {

FLUX_CLONES void adamw_cpu(float* __restrict parameter,
                           const float* __restrict gradient,
                           float* __restrict exp_avg,
                           float* __restrict exp_avg_sq,
                           int64_t n,
                           const AdamWScalars& scalars) {
  const AdamWScalars s = scalars;
  for (int64_t i = 0; i < n; ++i)
    adamw_element(parameter + i, gradient + i, exp_avg + i, exp_avg_sq + i, s);
}

FLUX_CLONES void adamw_cpu(uint16_t* __restrict parameter,
                           const uint16_t* __restrict gradient,
                           uint16_t* __restrict exp_avg,
                           uint16_t* __restrict exp_avg_sq,
                           int64_t n,
                           const AdamWScalars& scalars) {
  const AdamWScalars s = scalars;
  for (int64_t i = 0; i < n; ++i)
    adamw_element(parameter + i, gradient + i, exp_avg + i, exp_avg_sq + i, s);
}

}  // namespace flux
