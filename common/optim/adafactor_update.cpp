#include "common/optim/adafactor_update.h"

#include <ATen/Parallel.h>

#include "common/optim/adafactor_cpu.h"
#include "common/optim/tile.h"

namespace flux {
namespace {

/// f(begin, end) for parts of `size` of [0, n), in parallel, the same parts on any number of threads.
template <class F>
void for_parts(int64_t n, int64_t size, const F& f) {
  at::parallel_for(0, (n + size - 1) / size, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) f(part * size, std::min(n, (part + 1) * size));
  });
}

/// The sum of f(begin, end) over parts, in their order.
template <class F>
double sum_of_parts(int64_t n, double* sums, const F& f) {
  for_parts(n, kAdafactorPart, [&](int64_t begin, int64_t end) {
    sums[begin / kAdafactorPart] = f(begin, end);
  });
  double sum = 0;
  for (int64_t i = 0; i < adafactor_num_parts(n); ++i) sum += sums[i];
  return sum;
}

void running_means(const Operands& o,
                   const AdafactorShape& shape,
                   const AdafactorScalars& scalars,
                   float* row_means,
                   float* column_means,
                   float* scratch) {
  if (const int64_t group = adafactor_group(shape); group > 0) {
    const int64_t groups = (shape.rows + group - 1) / group;
    for_parts(shape.rows, group, [&](int64_t begin, int64_t end) {
      float* const sums = scratch + begin / group * shape.columns;
      adafactor_rows_and_columns(o, 0, shape.columns, begin, end, scalars, row_means, sums);
    });
    for_parts(shape.columns, 1024, [&](int64_t begin, int64_t end) {
      adafactor_column_means(
          scratch, groups, shape.columns, shape.rows, begin, end, scalars, column_means);
    });
    return;
  }
  // many matrices, or one too wide for sums aside: a pass for rows, and one for columns
  for (int64_t matrix = 0; matrix < shape.batch; ++matrix) {
    const int64_t first = matrix * shape.rows * shape.columns;
    for_parts(shape.rows,
              std::max<int64_t>(1, kAdafactorPart / shape.columns),
              [&](int64_t begin, int64_t end) {
                adafactor_rows_and_columns(o,
                                           first,
                                           shape.columns,
                                           begin,
                                           end,
                                           scalars,
                                           row_means + matrix * shape.rows,
                                           nullptr);
              });
    for_parts(shape.columns, kTile, [&](int64_t begin, int64_t end) {
      adafactor_columns(
          o, first, shape, begin, end, scalars, column_means + matrix * shape.columns);
    });
  }
}

}  // namespace

void adafactor_update(const Operands& o,
                      const AdafactorArguments& arguments,
                      const AdafactorScalars& scalars) {
  AdafactorFactors factors = arguments.factors;
  double* const sums = arguments.sums;
  if (factors.full_means == nullptr) {
    const AdafactorShape& shape = factors.shape;
    float *const row_means = arguments.row_means, *const column_means = arguments.column_means;
    float *const means = arguments.floats, *const wide = arguments.floats + shape.batch;
    running_means(o, shape, scalars, row_means, column_means, wide);
    for (int64_t matrix = 0; matrix < shape.batch; ++matrix) {
      double sum = 0;
      for (int64_t row = 0; row < shape.rows; ++row)
        sum += static_cast<double>(row_means[matrix * shape.rows + row]);
      means[matrix] = static_cast<float>(sum / static_cast<double>(shape.rows));
    }
    factors.row_means = row_means;
    factors.mean_row_means = means;
    factors.column_means = column_means;
    if (const int64_t all = shape.batch * shape.columns; all <= kAdafactorColumns) {
      adafactor_inverse_roots(column_means, 0, all, wide);
      factors.inverse_root_columns = wide;
    }
  }
  const double update_squares = sum_of_parts(o.n, sums, [&](int64_t begin, int64_t end) {
    return adafactor_update_squares(o, factors, scalars, begin, end);
  });
  double squares = 0;
  if (scalars.scale_parameter != 0) {
    squares = sum_of_parts(
        o.n, sums, [&](int64_t begin, int64_t end) { return weight_squares(o, begin, end); });
  }
  const AdafactorApply apply = adafactor_apply(scalars, update_squares, squares, o.n);
  for_parts(o.n, kAdafactorPart, [&](int64_t begin, int64_t end) {
    adafactor_apply_range(o, factors, apply, begin, end);
  });
}

}  // namespace flux
