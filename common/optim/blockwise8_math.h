// common/optim/blockwise8_math.h - nearest codes by one look-up, the same source for CPU and CUDA. No
// LibTorch.
#pragma once
#include <cstdint>

#include "common/optim/rounding.h"

namespace flux {

constexpr int64_t kBlock8 = 256;

/// Cells of [0, 1] by the upper 16 bits of the float: 128 a binade from 2^-23 to 1, which itself is
/// the last cell. No cell holds more than one midpoint of two neighbouring codes: the densest part of
/// the unsigned map has midpoints 0.0053 apart, and cells are at most 0.0039 wide.
constexpr uint32_t kFirstCell = (127 - 23) << 7, kLastCell = 127 << 7;
constexpr uint32_t kNumCells = kLastCell - kFirstCell + 1;

struct Map8 {
  float values[256];
  /// Per cell of |x|, first of x > 0, then of x < 0: code << 16 | t. The nearest code is `code` where
  /// the lower 16 bits of x are at most t, and one further from that of 0 beyond.
  uint32_t cells[2 * kNumCells];
};

/// The nearest code of x in [-1, 1]; anything else gives some code.
FLUX_OPTIM_INLINE uint8_t nearest8(float x, const uint32_t* cells) {
  // without branches, and with signed indices, so that loops over it vectorise
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
  const auto sign = static_cast<int32_t>(bits >> 31);
  int32_t cell = static_cast<int32_t>(magnitude >> 16);
  cell = cell < static_cast<int32_t>(kFirstCell) ? static_cast<int32_t>(kFirstCell) : cell;
  cell = cell > static_cast<int32_t>(kLastCell) ? static_cast<int32_t>(kLastCell) : cell;
  // below the first cell the lower bits say nothing, but neither lies there a midpoint nor in the first cell
  const uint32_t entry =
      cells[cell - static_cast<int32_t>(kFirstCell) + sign * static_cast<int32_t>(kNumCells)];
  const int32_t beyond = (magnitude & 0xFFFFu) > (entry & 0xFFFFu) ? 1 : 0;
  return static_cast<uint8_t>(static_cast<int32_t>(entry >> 16) + beyond * (1 - 2 * sign));
}

}  // namespace flux
