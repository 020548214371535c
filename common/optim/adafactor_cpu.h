// common/optim/adafactor_cpu.h - the passes of Adafactor over ranges of a parameter. No LibTorch, so that
// they have their own compiler flags. All give the same bits on any machine.
#pragma once
#include <cstdint>

#include "common/optim/adafactor_math.h"
#include "common/optim/operands.h"

namespace flux {

/// Adds the squares of rows [begin, end) of one matrix (of gradient elements from `first` on) to the
/// rows' running means, and writes their column sums to column_sums [columns] unless it is null.
void adafactor_rows_and_columns(const Operands& operands,
                                int64_t first,
                                int64_t columns,
                                int64_t begin,
                                int64_t end,
                                const AdafactorScalars& scalars,
                                float* row_means,
                                float* column_sums);
/// Adds the squares of rows [0, rows) to the running means of columns [begin, end) of one matrix.
void adafactor_columns(const Operands& operands,
                       int64_t first,
                       const AdafactorShape& shape,
                       int64_t begin,
                       int64_t end,
                       const AdafactorScalars& scalars,
                       float* column_means);
/// column_means of [begin, end) take in the sum of `groups` lists of column sums, each of `columns`.
void adafactor_column_means(const float* column_sums,
                            int64_t groups,
                            int64_t columns,
                            int64_t rows,
                            int64_t begin,
                            int64_t end,
                            const AdafactorScalars& scalars,
                            float* column_means);
/// 1 / sqrt of [begin, end).
void adafactor_inverse_roots(const float* in, int64_t begin, int64_t end, float* out);

/// The sum of squared updates of elements [begin, end), begin a multiple of kTile; running means of
/// single elements take the gradient in.
double adafactor_update_squares(const Operands& operands,
                                const AdafactorFactors& factors,
                                const AdafactorScalars& scalars,
                                int64_t begin,
                                int64_t end);
/// The sum of squared weights.
double weight_squares(const Operands& operands, int64_t begin, int64_t end);
/// Changes weights [begin, end). states[0]: the first moment, null without one.
void adafactor_apply_range(const Operands& operands,
                           const AdafactorFactors& factors,
                           const AdafactorApply& apply,
                           int64_t begin,
                           int64_t end);

}  // namespace flux
