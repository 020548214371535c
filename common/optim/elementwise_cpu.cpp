#include "common/optim/elementwise_cpu.h"

#include "common/optim/tile.h"

namespace flux {
namespace {

/// `element`(p, g, first moment, second moment) for every element of the range.
template <class Element>
FLUX_TILE_INLINE void two_moments(const Operands& o, int64_t begin, int64_t end, Element element) {
  float p[kTile], g[kTile], m[kTile], v[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = std::min(kTile, end - at);
    load_gradient(o, at, n, g);
    load_weights(o, at, n, p);
    load_tile(o.states[0], o.states_bf16, at, n, m);
    load_tile(o.states[1], o.states_bf16, at, n, v);
    for (int64_t i = 0; i < n; ++i) element(p + i, g + i, m + i, v + i);
    store_tile(m, o.states[0], o.states_bf16, at, n);
    store_tile(v, o.states[1], o.states_bf16, at, n);
    store_weights(o, p, at, n);
  }
}

}  // namespace

FLUX_CLONES void adamw_range(const Operands& o,
                             const AdamWScalars& scalars,
                             int64_t begin,
                             int64_t end) {
  const AdamWScalars s = scalars;
  two_moments(
      o,
      begin,
      end,
      [&](float* p, const float* g, float* m, float* v)
          __attribute__((always_inline)) { adamw_element(p, g, m, v, s); });
}

}  // namespace flux
