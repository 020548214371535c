// common/optim/adafactor_math.h - Adafactor of single elements, the same source for CPU and CUDA. No
// LibTorch.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/optim/rounding.h"

namespace flux {

/// A parameter of two or more dimensions as `batch` matrices; columns is the last dimension.
struct AdafactorShape {
  int64_t batch, rows, columns;
};

/// The factors of the updates of elements.
struct AdafactorFactors {
  AdafactorShape shape;
  const float* row_means;             // [batch, rows]
  const float* mean_row_means;        // [batch]
  const float* column_means;          // [batch, columns]
  const float* inverse_root_columns;  // [batch, columns], or null: then they are computed
  float* full_means;                  // [n]: no factors, but a running mean of each element
};

/// Elements of a part of the passes whose sums are needed: sums are made part by part and then added
/// in a fixed order, so that they do not depend on the number of threads.
constexpr int64_t kAdafactorPart = 1 << 14;
/// Floats for the column sums of groups of rows, and then for the columns' factors.
constexpr int64_t kAdafactorColumns = 1 << 17;

inline int64_t adafactor_num_parts(int64_t n) { return (n + kAdafactorPart - 1) / kAdafactorPart; }
/// Elements of scratch: doubles for the parts' sums, and the two totals.
inline int64_t adafactor_num_sums(int64_t n) { return adafactor_num_parts(n) + 2; }
/// Elements of scratch, with factors: floats for the mean row mean of each matrix, and columns.
inline int64_t adafactor_num_floats(const AdafactorShape& shape) {
  const int64_t columns = 64 * shape.batch * shape.columns;
  return shape.batch + (columns < kAdafactorColumns ? columns : kAdafactorColumns);
}
/// Rows whose column sums are kept apart, so that they can be made at the same time; 0: none are, for
/// there are many matrices, or one too wide.
inline int64_t adafactor_group(const AdafactorShape& shape) {
  if (shape.batch != 1 || shape.columns > kAdafactorColumns) return 0;
  const int64_t wide = kAdafactorColumns / shape.columns, groups = wide < 64 ? wide : 64;
  const int64_t rows = (shape.rows + groups - 1) / groups;
  return rows < 16 ? 16 : rows;
}

/// What all elements share before the root mean squares of a step are known.
struct AdafactorScalars {
  float beta2, one_minus_beta2;  // of this step
  float eps1, eps2;
  float clip_threshold;
  float learning_rate;
  float beta1, one_minus_beta1;
  float weight_decay;
  float has_beta1, scale_parameter;  // 1 or 0
};

/// What the last pass needs beyond.
struct AdafactorApply {
  float divisor;        // max(1, rms(u) / clip_threshold)
  float learning_rate;  // with the parameter's scale
  float decay;          // -weight_decay * learning_rate
  float beta1, one_minus_beta1;
};

FLUX_OPTIM_INLINE AdafactorApply adafactor_apply(const AdafactorScalars& s,
                                                 double update_squares,
                                                 double weight_squares,
                                                 int64_t n) {
  AdafactorApply a;
  const float rms = static_cast<float>(sqrt(update_squares / static_cast<double>(n)));
  const float ratio = rms / s.clip_threshold;
  a.divisor = ratio < 1 ? 1 : ratio;  // NaN stays NaN
  a.learning_rate = s.learning_rate;
  if (s.scale_parameter != 0) {
    const float scale = static_cast<float>(sqrt(weight_squares / static_cast<double>(n)));
    a.learning_rate = (scale < s.eps2 ? s.eps2 : scale) * s.learning_rate;
  }
  a.decay = -s.weight_decay * a.learning_rate;
  a.beta1 = s.beta1;
  a.one_minus_beta1 = s.one_minus_beta1;
  return a;
}

/// A mean of squares taken into its running mean.
FLUX_OPTIM_INLINE float adafactor_mean(float mean, float fresh, const AdafactorScalars& s) {
  return mean * s.beta2 + s.one_minus_beta2 * fresh;
}

/// u before clipping, of a matrix: row_factor = 1 / sqrt(R / mean(R)), column_factor = 1 / sqrt(C).
FLUX_OPTIM_INLINE float adafactor_update(float g, float row_factor, float column_factor) {
  return row_factor * column_factor * g;
}

FLUX_OPTIM_INLINE float inverse_root(float x) { return 1.0f / sqrtf(x); }

}  // namespace flux
