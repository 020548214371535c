// common/optim/norm.h - sums of squares that do not depend on the number of threads.
#pragma once
#include <cstdint>
#include <vector>

#include "common/tensor/fwd.h"

namespace flux {

/// Elements of a part whose sum has its own order.
inline constexpr int64_t kSquaresPart = int64_t{1} << 14;

/// The sums of the squares of elements [k kSquaresPart, (k + 1) kSquaresPart), for every k. A tensor cut at multiples of
/// kSquaresPart has the sums of its pieces. Otherwise as sum_of_squares().
std::vector<double> squares_by_part(const at::Tensor& tensor);

/// The sum of the squares of a float32|bfloat16 tensor: of contiguous CPU tensors in parts of fixed size
/// and order, within a part over fixed lanes in float32; elsewhere by LibTorch, in the device's order. 0
/// without elements and on the Meta device. For global norms: add over tensors in a fixed order.
double sum_of_squares(const at::Tensor& tensor);

}  // namespace flux
