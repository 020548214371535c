// common/engine/share_layout.h - the record of a block that ranks share out, and what of it is one rank's.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/engine/block_loop.h"
#include "common/engine/record_layout.h"

namespace flux::engine {

/// Elements. Parts of sums of squares (kSquaresPart), of 8-bit states (256) and of random numbers (1024) lie in one rank
/// each, so that results do not depend on how many there are.
inline constexpr int64_t kShareGranule = int64_t{1} << 14;

/// The tensors of `layout`, all of one dtype, in a record that is `world` equal parts.
RecordLayout shared_layout(const RecordLayout& layout, int64_t world);

/// How rank `rank` of `world` shares that record: `trainables` are its tensors in order; Share::owned gets their names, ids
/// and factors, the ranges and no values.
Share make_share(const RecordLayout& layout,
                 const std::vector<Trainable>& trainables,
                 int64_t world,
                 int64_t rank);

/// The elements of owned tensor i in this rank's part, one-dimensional, sharing its memory.
///   part  uint8 [elements * element size], contiguous
at::Tensor owned_view(const Share& share, size_t i, const at::Tensor& part, c10::ScalarType dtype);

}  // namespace flux::engine
