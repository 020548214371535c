// common/optim/norm.h - sums of squares that do not depend on the number of threads.
#pragma once
#include "common/tensor/fwd.h"

namespace flux {

/// The sum of the squares of a float32|bfloat16 tensor: of contiguous CPU tensors in parts of fixed size
/// and order, within a part over fixed lanes in float32; elsewhere by LibTorch, in the device's order. 0
/// without elements and on the Meta device. For global norms: add over tensors in a fixed order.
double sum_of_squares(const at::Tensor& tensor);

}  // namespace flux
