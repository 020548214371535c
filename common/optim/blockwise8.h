// common/optim/blockwise8.h - the 8-bit code of optimizer states: a byte an element, and for each
// block of 256 elements its largest absolute value. No LibTorch.
#pragma once
#include <cstdint>
#include <span>

#include "common/optim/blockwise8_math.h"

namespace flux {

/// The 256 values of bitsandbytes' dynamic map, rising; without a sign they lie in [0, 1], with one in
/// (-1, 1]. Source: bitsandbytes 0.50.2, functional.py, create_dynamic_map.
const Map8& map8(bool is_signed);

/// Codes and absmax of `values` (sizes: n, n, ceil(n / 256)): the code of value / absmax is the
/// nearest of the map; on the midpoint of two (computed in float32) it is the lower one; in a block
/// of zeros it is the code of 0.
void quantize8(std::span<const float> values,
               bool is_signed,
               std::span<uint8_t> codes,
               std::span<float> absmax);
/// map[code] * absmax of its block.
void dequantize8(std::span<const uint8_t> codes,
                 std::span<const float> absmax,
                 bool is_signed,
                 std::span<float> values);

}  // namespace flux
