// common/optim/tile.h - a piece of a parameter in float32 on the stack, for CPU kernels: the
// arithmetic of an optimizer then knows nothing of dtypes and roundings. No LibTorch.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/optim/operands.h"
#include "common/optim/tile_simd.h"

// An address sanitizer is not ready yet when the loader picks a version.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define FLUX_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FLUX_CLONES
#endif
#define FLUX_TILE_INLINE inline __attribute__((always_inline))

namespace flux {

/// Elements of a tile; a multiple of 256 (a block of 8-bit states), small enough that all arrays of
/// a kernel stay in the first cache.
constexpr int64_t kTile = 1024;

FLUX_TILE_INLINE void load_tile(const void* from, bool bf16, int64_t begin, int64_t n, float* out) {
  if (bf16) {
    const auto* const in = static_cast<const uint16_t*>(from) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
  } else {
    const auto* const in = static_cast<const float*>(from) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = in[i];
  }
}

/// To nearest even if bf16.
FLUX_TILE_INLINE void store_tile(const float* in, void* to, bool bf16, int64_t begin, int64_t n) {
  if (bf16) {
    auto* const out = static_cast<uint16_t*>(to) + begin;
    for (int64_t i = 0; i < n; ++i) round_to(in[i], out + i);
  } else {
    auto* const out = static_cast<float*>(to) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = in[i];
  }
}

FLUX_TILE_INLINE void load_gradient(const Operands& o, int64_t begin, int64_t n, float* out) {
  load_tile(o.gradient, o.gradient_bf16, begin, n, out);
  if (o.gradient_scale != 1)
    for (int64_t i = 0; i < n; ++i) out[i] *= o.gradient_scale;
}

/// The weights before the step.
FLUX_TILE_INLINE void load_weights(const Operands& o, int64_t begin, int64_t n, float* out) {
  if (o.keep == Keep::kMaster && !o.first) return load_tile(o.extra, false, begin, n, out);
  load_tile(o.parameter, o.keep != Keep::kFloat, begin, n, out);
  if (o.keep == Keep::kKahan) {
    const auto* const lost = static_cast<const uint16_t*>(o.extra) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] += to_float(lost[i]);
  }
}

/// The weights after it. begin is a multiple of kTile.
FLUX_TILE_INLINE void store_weights(const Operands& o, const float* in, int64_t begin, int64_t n) {
  auto* const out = static_cast<uint16_t*>(o.parameter) + begin;
  switch (o.keep) {
    case Keep::kFloat:
      return store_tile(in, o.parameter, false, begin, n);
    case Keep::kNearest:
    case Keep::kPlain:
      return store_tile(in, o.parameter, true, begin, n);
    case Keep::kStochastic: {
      uint16_t random[kTile];
      // a tile begins at a multiple of its blocks, so that the lower half of the counter does not wrap in it
      tile_functions().random(
          o.key, static_cast<uint64_t>(o.offset + begin) / 8, (n + 7) / 8, random);
      for (int64_t i = 0; i < n; ++i) out[i] = round_stochastic(in[i], random[i]);
      return;
    }
    case Keep::kKahan: {
      auto* const lost = static_cast<uint16_t*>(o.extra) + begin;
      for (int64_t i = 0; i < n; ++i) {
        round_to(in[i], out + i);
        round_to(in[i] - to_float(out[i]), lost + i);
      }
      return;
    }
    case Keep::kMaster:
      store_tile(in, o.extra, false, begin, n);
      return store_tile(in, o.parameter, true, begin, n);
  }
}

}  // namespace flux
