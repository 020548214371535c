// common/optim/adamw8bit.h - AdamW with both moments in 8 bits.
#pragma once
#include <cstdint>

namespace flux {

/// Update and states of bitsandbytes' AdamW8bit, with the order of operations of its CPU backend and
/// exact nearest codes: moments are decoded, updated as AdamW does (the new weight takes them
/// unrounded) and encoded again, each block of 256 elements of the flattened parameter by its
/// largest absolute value (blockwise8.h).
///
/// States: state1 (first moment, signed map) and state2 (second, unsigned map), uint8 of the
/// parameter's shape; absmax1 and absmax2, float32 [ceil(numel / 256)]. A parameter of fewer than
/// `min_8bit_size` elements has float32 state1 and state2 and no absmax.
/// Source: Dettmers et al. 2022, arXiv:2110.02861; bitsandbytes 0.50.2,
/// _optimizer_update_8bit_blockwise_cpu.
struct AdamW8bitOptions {
  double beta1 = 0.9, beta2 = 0.999;
  double eps = 1e-8;  // outside the square root
  double weight_decay = 0.01;
  int64_t min_8bit_size = 4096;
};

}  // namespace flux
