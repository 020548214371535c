// pipelines/stage/halving.h - batches that get smaller where memory runs out.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "common/core/log.h"
#include "common/tensor/memory_errors.h"

namespace flux::stage {

/// Calls compute(begin, count) for parts of [0, num_samples), in order, of at most `batch_size`
/// samples, and then take(begin, count, result). Where memory runs out in compute(), halves
/// `batch_size` for good, logs it once, and computes that part again in smaller ones: so compute()
/// must leave nothing behind when it throws; what take() throws ends it. One sample for which
/// memory does not suffice is an OutOfMemory.
template <class Compute, class Take>
void encode_in_batches(int64_t num_samples,
                       int64_t& batch_size,
                       const Compute& compute,
                       const Take& take) {
  for (int64_t begin = 0; begin < num_samples;) {
    const int64_t count = std::min(batch_size, num_samples - begin);
    std::optional<decltype(compute(begin, count))> result;
    try {
      result = with_memory_errors("not enough memory to encode one sample",
                                  "use a smaller resolution, --precision bf16, or --device cpu",
                                  [&] { return compute(begin, count); });
    } catch (const OutOfMemory&) {
      if (count == 1) throw;
      batch_size = std::max<int64_t>(1, count / 2);
      log::warn("memory ran out with {} samples at once: going on with {}", count, batch_size);
      continue;
    }
    take(begin, count, std::move(*result));
    begin += count;
  }
}

}  // namespace flux::stage
