#include "pipelines/model/random_values.h"

#include <bit>

// An address sanitizer is not ready yet when the loader picks a version.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define FLUX_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define FLUX_CLONES
#endif

namespace flux::model {

// The hash is the finaliser of MurmurHash3 between the two halves of the key.
FLUX_CLONES void fill_random(uint64_t key,
                             uint64_t first,
                             float mean,
                             float deviation,
                             int64_t n,
                             uint16_t* __restrict out) {
  const auto low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32),
             start = static_cast<uint32_t>(first);
  // four bytes: variance 4 * (256^2 - 1) / 12
  const float scale = deviation / 147.80054f;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t x = (start + static_cast<uint32_t>(i)) ^ low;
    x ^= x >> 16;
    x *= 0x85EBCA6Bu;
    x ^= high;
    x ^= x >> 13;
    x *= 0xC2B2AE35u;
    x ^= x >> 16;
    const uint32_t pairs = (x & 0x00FF00FFu) + (x >> 8 & 0x00FF00FFu);
    const auto sum = static_cast<int32_t>((pairs & 0xFFFFu) + (pairs >> 16)) - 510;
    const auto bits = std::bit_cast<uint32_t>(mean + scale * static_cast<float>(sum));
    out[i] = static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }
}

}  // namespace flux::model
