// common/optim/tile_simd.h - the three loops that compilers do not vectorise, with instructions that are
// looked for when the program starts. No LibTorch.
#pragma once
#include <cstdint>

#include "common/optim/blockwise8_math.h"
#include "common/optim/rounding.h"

namespace flux {

struct TileFunctions {
  const char* name;
  /// Numbers 8 first_block .. 8 (first_block + blocks) of the stream. The lower 32 bits of the counter
  /// do not wrap between.
  void (*random)(const RoundingKey& key, uint64_t first_block, int64_t blocks, uint16_t* out);
  /// map[code] * absmax.
  void (*decode8)(const uint8_t* codes, float absmax, const float* map, int64_t n, float* out);
  /// nearest8(value / absmax).
  void (*encode8)(
      const float* values, float absmax, const uint32_t* cells, int64_t n, uint8_t* codes);
};

/// Those of this machine; all give the same bits.
const TileFunctions& tile_functions();
/// All that this machine has, plain code first: for tests.
int num_tile_functions();
const TileFunctions& tile_functions(int i);

}  // namespace flux
