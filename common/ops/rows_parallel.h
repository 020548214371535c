// common/ops/rows_parallel.h - the CPU faces' loop over rows: threads, and the type of the numbers.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "common/ops/rows_impl.h"

namespace flux::kernel {

// Fewer rows than this are not worth a second thread.
inline constexpr int64_t kRowsPerThread = 16;

/// Calls run(T(), first, last) for ranges of [0, count), T being the type of the numbers of `like`.
template <class Run>
void for_ranges(const at::Tensor& like, int64_t count, int64_t grain, const Run& run) {
  at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    like.scalar_type() == at::kBFloat16 ? run(Bf16Bits{}, first, last) : run(float{}, first, last);
  });
}

/// x with numbers of a row as neighbours.
inline at::Tensor dense_rows(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

}  // namespace flux::kernel
