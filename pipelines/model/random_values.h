// pipelines/model/random_values.h - random bfloat16 weights at the rate of a disk. No LibTorch, so
// that it has its own compiler flags.
#pragma once
#include <cstdint>

namespace flux::model {

/// out[i] = mean + deviation * x, rounded to nearest even, where x is element first + i of a stream
/// fixed by `key`: the sum of four bytes of a 32-bit hash of the element's number, shifted and
/// scaled to mean 0 and deviation 1; close to normal, within 3.5 of 0. The same bits on any machine.
/// first + n is at most 2^32.
void fill_random(
    uint64_t key, uint64_t first, float mean, float deviation, int64_t n, uint16_t* out);

}  // namespace flux::model
