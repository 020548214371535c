// common/optim/adafactor_update.h - Adafactor's passes over one parameter on all threads, and the scratch
// they need on any device.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/optim/op_arguments.h"

namespace flux {

/// Elements of a part of the second and third pass: sums are made part by part, and then in the parts'
/// order, so that they do not depend on the number of threads.
constexpr int64_t kAdafactorPart = 1 << 14;
/// Floats for the column sums of groups of rows, and then for the columns' factors.
constexpr int64_t kAdafactorColumns = 1 << 17;

/// Elements of the scratch of adafactor_arguments().
inline int64_t adafactor_num_sums(int64_t n) { return (n + kAdafactorPart - 1) / kAdafactorPart; }
/// Of a parameter without factors: 0.
inline int64_t adafactor_num_floats(const AdafactorShape& shape) {
  return shape.batch + std::min(kAdafactorColumns, 64 * shape.batch * shape.columns);
}

void adafactor_update(const Operands& operands,
                      const AdafactorArguments& arguments,
                      const AdafactorScalars& scalars);

}  // namespace flux
