#include "common/optim/elementwise_cpu.h"

#include "common/optim/lanes.h"
#include "common/optim/tile.h"

namespace flux {
namespace {

#define FLUX_LAMBDA_INLINE __attribute__((always_inline))

/// `element`(p, g, first state, second state) for every element of the range; states from kStates on are
/// not looked at.
template <int kStates, class Element>
FLUX_TILE_INLINE void for_elements(const Operands& o, int64_t begin, int64_t end, Element element) {
  float p[kTile], g[kTile], a[kTile], b[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = std::min(kTile, end - at);
    load_gradient(o, at, n, g);
    load_weights(o, at, n, p);
    if constexpr (kStates > 0) load_tile(o.states[0], o.states_bf16, at, n, a);
    if constexpr (kStates > 1) load_tile(o.states[1], o.states_bf16, at, n, b);
    for (int64_t i = 0; i < n; ++i) element(p + i, g[i], a + i, b + i);
    if constexpr (kStates > 0) store_tile(a, o.states[0], o.states_bf16, at, n);
    if constexpr (kStates > 1) store_tile(b, o.states[1], o.states_bf16, at, n);
    store_weights(o, p, at, n);
  }
}

}  // namespace

FLUX_CLONES void adamw_range(const Operands& o,
                             const AdamWScalars& scalars,
                             int64_t begin,
                             int64_t end) {
  const AdamWScalars s = scalars;
  if (o.keep == Keep::kPlain) {
    for_elements<2>(o, begin, end, [&](float* p, float g, float* m, float* v) FLUX_LAMBDA_INLINE {
      adamw_values<uint16_t>(p, g, m, v, s);
    });
  } else {
    for_elements<2>(o, begin, end, [&](float* p, float g, float* m, float* v) FLUX_LAMBDA_INLINE {
      adamw_values<float>(p, g, m, v, s);
    });
  }
}

FLUX_CLONES void lion_range(const Operands& o,
                            const LionScalars& scalars,
                            int64_t begin,
                            int64_t end) {
  const LionScalars s = scalars;
  if (o.keep == Keep::kPlain) {
    for_elements<1>(o, begin, end, [&](float* p, float g, float* m, float*) FLUX_LAMBDA_INLINE {
      lion_values<uint16_t>(p, g, m, s);
    });
  } else {
    for_elements<1>(o, begin, end, [&](float* p, float g, float* m, float*) FLUX_LAMBDA_INLINE {
      lion_values<float>(p, g, m, s);
    });
  }
}

FLUX_CLONES void sgd_range(const Operands& o,
                           const SgdScalars& scalars,
                           int64_t begin,
                           int64_t end) {
  const SgdScalars s = scalars;
  for_elements<1>(o, begin, end, [&](float* p, float g, float* m, float*) FLUX_LAMBDA_INLINE {
    sgd_values(p, g, m, s);
  });
}

FLUX_CLONES void schedule_free_range(const Operands& o,
                                     const ScheduleFreeScalars& scalars,
                                     int64_t begin,
                                     int64_t end) {
  const ScheduleFreeScalars s = scalars;
  for_elements<2>(o, begin, end, [&](float* y, float g, float* z, float* v) FLUX_LAMBDA_INLINE {
    schedule_free_values(y, g, z, v, s);
  });
}

FLUX_CLONES void prodigy_range(const Operands& o,
                               const ProdigyScalars& scalars,
                               int64_t begin,
                               int64_t end) {
  const ProdigyScalars s = scalars;
  for_elements<2>(o, begin, end, [&](float* p, float, float* m, float* v) FLUX_LAMBDA_INLINE {
    prodigy_values(p, *m, *v, s);
  });
}

FLUX_CLONES void prodigy_observe_range(
    const Operands& o, const ProdigyScalars& scalars, int64_t begin, int64_t end, double* sums) {
  const ProdigyScalars s = scalars;
  float p[kTile], g[kTile], m[kTile], v[kTile], dots[kTile], sizes[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = std::min(kTile, end - at);
    float *const sum = static_cast<float*>(o.states[2]) + at, *const p0 =
                                                                  static_cast<float*>(o.states[3]) +
                                                                  at;
    load_gradient(o, at, n, g);
    load_weights(o, at, n, p);
    // the step that follows may be left out
    if (o.keep == Keep::kMaster && o.first) store_tile(p, o.extra, false, at, n);
    load_tile(o.states[0], o.states_bf16, at, n, m);
    load_tile(o.states[1], o.states_bf16, at, n, v);
    for (int64_t i = 0; i < n; ++i) {
      dots[i] = prodigy_observed(p[i], g[i], m + i, v + i, sum + i, p0 + i, s);
      sizes[i] = fabsf(sum[i]);
    }
    store_tile(m, o.states[0], o.states_bf16, at, n);
    store_tile(v, o.states[1], o.states_bf16, at, n);
    sums[0] += sum_of(dots, n);
    sums[1] += sum_of(sizes, n);
  }
}

FLUX_CLONES void ema_range(const Operands& o,
                           const EmaScalars& scalars,
                           int64_t begin,
                           int64_t end) {
  const EmaScalars s = scalars;
  for_elements<0>(
      o, begin, end, [&](float* shadow, float weight, float*, float*) FLUX_LAMBDA_INLINE {
        ema_values(shadow, weight, s);
      });
}

}  // namespace flux
