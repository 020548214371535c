#include "common/optim/adamw8bit_cpu.h"

#include "common/optim/blockwise8.h"
#include "common/optim/tile.h"

namespace flux {
namespace {

/// Returns the largest absolute value.
FLUX_TILE_INLINE float encode(
    const TileFunctions& f, const float* values, const uint32_t* cells, int64_t n, uint8_t* codes) {
  // magnitudes are ordered as their bits, and the largest of integers is found in any order
  uint32_t largest_bits = 0;
  for (int64_t i = 0; i < n; ++i)
    largest_bits = std::max(largest_bits, bits_of(values[i]) & 0x7FFFFFFFu);
  const float largest = float_of(largest_bits);
  f.encode8(values, largest > 0 ? largest : 1.0f, cells, n, codes);
  return largest;
}

}  // namespace

FLUX_CLONES void adamw8bit_range(const Operands& o,
                                 float* absmax1,
                                 float* absmax2,
                                 const AdamW8bitScalars& scalars,
                                 int64_t begin,
                                 int64_t end) {
  const AdamW8bitScalars s = scalars;
  const TileFunctions& f = tile_functions();
  const Map8 &map1 = map8(true), &map2 = map8(false);
  auto *const codes1 = static_cast<uint8_t*>(o.states[0]), *const codes2 =
                                                               static_cast<uint8_t*>(o.states[1]);
  float p[kTile], g[kTile], m[kBlock8], v[kBlock8];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = std::min(kTile, end - at);
    load_gradient(o, at, count, g);
    load_weights(o, at, count, p);
    for (int64_t from = 0; from < count; from += kBlock8) {
      const int64_t n = std::min(kBlock8, count - from), block = (at + from) / kBlock8;
      float *const pb = p + from, *const gb = g + from;
      f.decode8(codes1 + at + from, absmax1[block], map1.values, n, m);
      f.decode8(codes2 + at + from, absmax2[block], map2.values, n, v);
      for (int64_t i = 0; i < n; ++i) {
        adamw8bit_moments(gb[i], m + i, v + i, s);
        pb[i] = adamw8bit_weight(pb[i], m[i], v[i], s);
      }
      absmax1[block] = encode(f, m, map1.cells, n, codes1 + at + from);
      absmax2[block] = encode(f, v, map2.cells, n, codes2 + at + from);
    }
    store_weights(o, p, at, count);
  }
}

FLUX_CLONES void adamw8bit_small_range(const Operands& o,
                                       const AdamW8bitScalars& scalars,
                                       int64_t begin,
                                       int64_t end) {
  const AdamW8bitScalars s = scalars;
  float p[kTile], g[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = std::min(kTile, end - at);
    float *const m = static_cast<float*>(o.states[0]) + at, *const v =
                                                                static_cast<float*>(o.states[1]) +
                                                                at;
    load_gradient(o, at, n, g);
    load_weights(o, at, n, p);
    for (int64_t i = 0; i < n; ++i) {
      adamw8bit_moments(g[i], m + i, v + i, s);
      p[i] = adamw8bit_small_weight(p[i], m[i], v[i], s);
    }
    store_weights(o, p, at, n);
  }
}

}  // namespace flux
