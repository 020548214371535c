#include "common/optim/adafactor_cpu.h"

#include "common/optim/lanes.h"
#include "common/optim/tile.h"

namespace flux {
namespace {

/// The sum of n <= kTile squares; a[n ..) up to a multiple of kLanes is overwritten.
FLUX_TILE_INLINE double square_sum(float* a, int64_t n) {
  while (n % kLanes != 0) a[n++] = 0;
  Lanes sum{};
  for (int64_t i = 0; i < n; i += kLanes) {
    Lanes x;
    load_lanes(a + i, x);
    sum += x * x;
  }
  return sum_of_lanes(sum);
}

/// Squares of a gradient tile, with eps added; returns their sum.
FLUX_TILE_INLINE double gradient_squares(
    const Operands& o, int64_t begin, int64_t n, float eps, float* out) {
  load_gradient(o, begin, n, out);
  for (int64_t i = 0; i < n; ++i) out[i] = out[i] * out[i] + eps;
  return sum_of(out, n);
}

/// u before clipping of elements [begin, begin + n): g comes in, u goes out.
FLUX_TILE_INLINE void updates(const AdafactorFactors& f, int64_t begin, int64_t n, float* u) {
  if (f.full_means != nullptr) {
    const float* const means = f.full_means + begin;
    for (int64_t i = 0; i < n; ++i) u[i] = inverse_root(means[i]) * u[i];
    return;
  }
  const int64_t columns = f.shape.columns;
  int64_t row = begin / columns, column = begin % columns;
  for (int64_t at = 0; at < n; ++row, column = 0) {
    const int64_t count = std::min(columns - column, n - at), matrix = row / f.shape.rows;
    const float row_factor = inverse_root(f.row_means[row] / f.mean_row_means[matrix]);
    const int64_t first = matrix * columns + column;
    if (f.inverse_root_columns != nullptr) {
      const float* const factors = f.inverse_root_columns + first;
      for (int64_t i = 0; i < count; ++i)
        u[at + i] = adafactor_update(u[at + i], row_factor, factors[i]);
    } else {
      const float* const means = f.column_means + first;
      for (int64_t i = 0; i < count; ++i)
        u[at + i] = adafactor_update(u[at + i], row_factor, inverse_root(means[i]));
    }
    at += count;
  }
}

}  // namespace

FLUX_CLONES void adafactor_rows_and_columns(const Operands& o,
                                            int64_t first,
                                            int64_t columns,
                                            int64_t begin,
                                            int64_t end,
                                            const AdafactorScalars& scalars,
                                            float* row_means,
                                            float* column_sums) {
  const AdafactorScalars s = scalars;
  if (column_sums != nullptr)
    for (int64_t c = 0; c < columns; ++c) column_sums[c] = 0;
  float squares[kTile];
  for (int64_t row = begin; row < end; ++row) {
    double sum = 0;
    for (int64_t c = 0; c < columns; c += kTile) {
      const int64_t n = std::min(kTile, columns - c);
      sum += gradient_squares(o, first + row * columns + c, n, s.eps1, squares);
      if (column_sums == nullptr) continue;
      float* const sums = column_sums + c;
      for (int64_t i = 0; i < n; ++i) sums[i] += squares[i];
    }
    row_means[row] =
        adafactor_mean(row_means[row], static_cast<float>(sum / static_cast<double>(columns)), s);
  }
}

FLUX_CLONES void adafactor_columns(const Operands& o,
                                   int64_t first,
                                   const AdafactorShape& shape,
                                   int64_t begin,
                                   int64_t end,
                                   const AdafactorScalars& scalars,
                                   float* column_means) {
  const AdafactorScalars s = scalars;
  float g[kTile], sums[kTile];
  for (int64_t c = begin; c < end; c += kTile) {
    const int64_t n = std::min(kTile, end - c);
    for (int64_t i = 0; i < n; ++i) sums[i] = 0;
    for (int64_t row = 0; row < shape.rows; ++row) {
      load_gradient(o, first + row * shape.columns + c, n, g);
      for (int64_t i = 0; i < n; ++i) sums[i] += g[i] * g[i] + s.eps1;
    }
    for (int64_t i = 0; i < n; ++i) {
      column_means[c + i] =
          adafactor_mean(column_means[c + i], sums[i] / static_cast<float>(shape.rows), s);
    }
  }
}

FLUX_CLONES void adafactor_column_means(const float* column_sums,
                                        int64_t groups,
                                        int64_t columns,
                                        int64_t rows,
                                        int64_t begin,
                                        int64_t end,
                                        const AdafactorScalars& scalars,
                                        float* column_means) {
  const AdafactorScalars s = scalars;
  for (int64_t c = begin; c < end; ++c) {
    double sum = 0;
    for (int64_t group = 0; group < groups; ++group)
      sum += static_cast<double>(column_sums[group * columns + c]);
    column_means[c] =
        adafactor_mean(column_means[c], static_cast<float>(sum / static_cast<double>(rows)), s);
  }
}

FLUX_CLONES void adafactor_inverse_roots(const float* in, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i) out[i] = inverse_root(in[i]);
}

FLUX_CLONES double adafactor_update_squares(const Operands& o,
                                            const AdafactorFactors& f,
                                            const AdafactorScalars& scalars,
                                            int64_t begin,
                                            int64_t end) {
  const AdafactorScalars s = scalars;
  float u[kTile];
  double sum = 0;
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = std::min(kTile, end - at);
    load_gradient(o, at, n, u);
    if (f.full_means != nullptr) {
      float* const means = f.full_means + at;
      for (int64_t i = 0; i < n; ++i) means[i] = adafactor_mean(means[i], u[i] * u[i] + s.eps1, s);
    }
    updates(f, at, n, u);
    sum += square_sum(u, n);
  }
  return sum;
}

FLUX_CLONES double weight_squares(const Operands& o, int64_t begin, int64_t end) {
  float p[kTile];
  double sum = 0;
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = std::min(kTile, end - at);
    load_weights(o, at, n, p);
    sum += square_sum(p, n);
  }
  return sum;
}

FLUX_CLONES void adafactor_apply_range(const Operands& o,
                                       const AdafactorFactors& f,
                                       const AdafactorApply& apply,
                                       int64_t begin,
                                       int64_t end) {
  const AdafactorApply a = apply;
  float p[kTile], u[kTile], m[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = std::min(kTile, end - at);
    load_gradient(o, at, n, u);
    load_weights(o, at, n, p);
    updates(f, at, n, u);
    if (a.divisor != 1)
      for (int64_t i = 0; i < n; ++i) u[i] /= a.divisor;
    for (int64_t i = 0; i < n; ++i) u[i] *= a.learning_rate;
    if (o.states[0] != nullptr) {
      load_tile(o.states[0], o.states_bf16, at, n, m);
      for (int64_t i = 0; i < n; ++i) u[i] = m[i] * a.beta1 + a.one_minus_beta1 * u[i];
      store_tile(u, o.states[0], o.states_bf16, at, n);
    }
    if (a.decay != 0)
      for (int64_t i = 0; i < n; ++i) p[i] += a.decay * p[i];
    for (int64_t i = 0; i < n; ++i) p[i] -= u[i];
    store_weights(o, p, at, n);
  }
}

}  // namespace flux
