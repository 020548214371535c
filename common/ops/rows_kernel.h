// common/ops/rows_kernel.h - index logic and arithmetic of AdaLN modulate, gated residual, GELU and the loss, one text for
// the CPU and the CUDA kernels. No LibTorch.
//
// A row is a token. `lanes` threads share a row (32 on a GPU, 1 on a CPU), each takes the packs lane, lane + lanes, ...,
// and `sum` adds a number over the threads of the row. Sums over tokens go by groups of rows: a group has one owner, in
// which a column belongs to one thread, so there is no race and the result does not depend on how many run at once.
#pragma once
#include "common/ops/loss_type.h"
#include "common/ops/pack.h"

namespace flux::kernel {

/// Rows [samples, tokens] of `width` numbers, in groups of `group` tokens of one sample.
struct RowsShape {
  int64_t samples = 0, tokens = 0, width = 0, group = 1;

  FLUX_PACK_FUNCTION int64_t num_rows() const { return samples * tokens; }
  FLUX_PACK_FUNCTION int64_t groups_per_sample() const { return (tokens + group - 1) / group; }
  FLUX_PACK_FUNCTION int64_t num_groups() const { return samples * groups_per_sample(); }
};

/// Where rows lie; the numbers of a row are neighbours. A stride of 0: the same for all.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t sample_stride = 0, token_stride = 0;

  FLUX_PACK_FUNCTION T* at(const RowsShape& s, int64_t row) const {
    return data + row / s.tokens * sample_stride + row % s.tokens * token_stride;
  }
};

/// Calls run(row) for the rows of group `index`.
template <class Run>
FLUX_PACK_FUNCTION void for_rows_of_group(const RowsShape& s, int64_t index, const Run& run) {
  const int64_t sample = index / s.groups_per_sample();
  const int64_t first = index % s.groups_per_sample() * s.group;
  const int64_t last = first + s.group < s.tokens ? first + s.group : s.tokens;
  for (int64_t token = first; token < last; ++token) run(sample * s.tokens + token);
}

// --- (1 + scale) * layer_norm(x) + shift

template <class T>
struct ModulateForward {
  RowsShape shape;
  Rows<const T> x, shift, scale;
  float eps;
  Rows<T> out;
  float* stats;  // [rows, 2]: mean, 1 / standard deviation
};

template <class T, class Sum>
FLUX_PACK_FUNCTION void modulate_row(
    const ModulateForward<T>& a, int64_t row, int64_t lane, int64_t lanes, const Sum& sum) {
  const int64_t n = a.shape.width;
  const T *x = a.x.at(a.shape, row), *shift = a.shift.at(a.shape, row),
          *scale = a.scale.at(a.shape, row);
  T* out = a.out.at(a.shape, row);
  const float count = static_cast<float>(n);
  Pack total = zeros();
  for_packs(n, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
    total = total + load(x + i, part);
  });
  const float mean = sum(sum_of(total)) / count;
  Pack squares = zeros();
  for_packs(n, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
    const Pack d = only(load(x + i, part) - mean, part);
    squares = squares + d * d;
  });
  const float r = 1.0f / sqrtf(sum(sum_of(squares)) / count + a.eps);
  if (lane == 0) {
    a.stats[2 * row] = mean;
    a.stats[2 * row + 1] = r;
  }
  for_packs(n, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
    const Pack normal = (load(x + i, part) - mean) * r;
    save(normal * (load(scale + i, part) + 1.0f) + load(shift + i, part), out + i, part);
  });
}

template <class T>
struct ModulateBackward {
  RowsShape shape;
  Rows<const T> grad, x, scale;
  const float* stats;
  Rows<T> grad_x;  // null: not wanted
  float* sums;     // [groups, 2, width]: of shift and scale; null: not wanted
};

/// With n = (x - mean) r and u = dy (1 + scale): dx = r (u - mean(u) - n mean(u n)), dshift = dy, dscale = dy n.
template <class T, class Sum>
FLUX_PACK_FUNCTION void modulate_backward_group(
    const ModulateBackward<T>& a, int64_t index, int64_t lane, int64_t lanes, const Sum& sum) {
  const int64_t n = a.shape.width;
  const float count = static_cast<float>(n);
  float *of_shift = nullptr, *of_scale = nullptr;
  if (a.sums) {
    of_shift = a.sums + index * 2 * n;
    of_scale = of_shift + n;
    for_packs(n, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
      save(zeros(), of_shift + i, part);
      save(zeros(), of_scale + i, part);
    });
  }
  for_rows_of_group(a.shape, index, [&](int64_t row) FLUX_PACK_LAMBDA {
    const T *grad = a.grad.at(a.shape, row), *x = a.x.at(a.shape, row),
            *scale = a.scale.at(a.shape, row);
    const float mean = a.stats[2 * row], r = a.stats[2 * row + 1];
    Pack u_sum = zeros(), un_sum = zeros();
    for_packs(n, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
      const Pack dy = load(grad + i, part), normal = (load(x + i, part) - mean) * r;
      const Pack u = dy * (load(scale + i, part) + 1.0f);
      u_sum = u_sum + u;  // dy is zero where there is no number
      un_sum = un_sum + u * normal;
      if (of_shift) {
        save(load(of_shift + i, part) + dy, of_shift + i, part);
        save(load(of_scale + i, part) + dy * normal, of_scale + i, part);
      }
    });
    if (!a.grad_x.data) return;
    T* grad_x = a.grad_x.at(a.shape, row);
    const float u_mean = sum(sum_of(u_sum)) / count, un_mean = sum(sum_of(un_sum)) / count;
    for_packs(n, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
      const Pack dy = load(grad + i, part), normal = (load(x + i, part) - mean) * r;
      const Pack u = dy * (load(scale + i, part) + 1.0f);
      save((u - u_mean - normal * un_mean) * r, grad_x + i, part);
    });
  });
}

// --- x + gate * update

template <class T>
struct GatedForward {
  RowsShape shape;
  Rows<const T> x, gate, update;
  Rows<T> out;
};

template <class T>
FLUX_PACK_FUNCTION void gated_row(const GatedForward<T>& a,
                                  int64_t row,
                                  int64_t lane,
                                  int64_t lanes) {
  const T *x = a.x.at(a.shape, row), *gate = a.gate.at(a.shape, row),
          *update = a.update.at(a.shape, row);
  T* out = a.out.at(a.shape, row);
  for_packs(a.shape.width, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
    save(load(x + i, part) + load(gate + i, part) * load(update + i, part), out + i, part);
  });
}

template <class T>
struct GatedBackward {
  RowsShape shape;
  Rows<const T> grad, gate, update;
  Rows<T> grad_update;  // null: not wanted
  float* sums;          // [groups, width]: of the gate; null: not wanted, and `update` is not read
};

template <class T>
FLUX_PACK_FUNCTION void gated_backward_group(const GatedBackward<T>& a,
                                             int64_t index,
                                             int64_t lane,
                                             int64_t lanes) {
  const int64_t n = a.shape.width;
  float* of_gate = a.sums ? a.sums + index * n : nullptr;
  if (of_gate)
    for_packs(n, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
      save(zeros(), of_gate + i, part);
    });
  for_rows_of_group(a.shape, index, [&](int64_t row) FLUX_PACK_LAMBDA {
    const T* grad = a.grad.at(a.shape, row);
    if (of_gate) {
      const T* update = a.update.at(a.shape, row);
      for_packs(n, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
        const Pack product = load(grad + i, part) * load(update + i, part);
        save(load(of_gate + i, part) + product, of_gate + i, part);
      });
    }
    if (!a.grad_update.data) return;
    const T* gate = a.gate.at(a.shape, row);
    T* out = a.grad_update.at(a.shape, row);
    for_packs(n, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
      save(load(grad + i, part) * load(gate + i, part), out + i, part);
    });
  });
}

// --- from the sums of the groups to one for each sample

template <class T>
struct GroupSums {
  RowsShape shape;    // `width` is that of all sets together
  const float* sums;  // [samples, groups, width]
  T* out;             // [samples, width]
};

template <class T>
FLUX_PACK_FUNCTION void add_groups(const GroupSums<T>& a,
                                   int64_t sample,
                                   int64_t lane,
                                   int64_t lanes) {
  const int64_t groups = a.shape.groups_per_sample(), n = a.shape.width;
  const float* sums = a.sums + sample * groups * n;
  for_packs(n, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
    Pack total = zeros();
    for (int64_t group = 0; group < groups; ++group)
      total = total + load(sums + group * n + i, part);
    save(total, a.out + sample * n + i, part);
  });
}

// --- GELU, tanh form: x / (1 + e^(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)

inline constexpr float kGeluSlope = 0.7978845608028654f, kGeluCube = 0.044715f;

FLUX_PACK_FUNCTION Pack gelu_of(Pack x) {
  const Pack u = (x + x * x * x * kGeluCube) * (-2 * kGeluSlope);
  return x / (exp_of(u) + 1.0f);
}
/// s + 2 x s (1 - s) u' with s = 1 / (1 + e^(-2 u)).
FLUX_PACK_FUNCTION Pack gelu_slope(Pack x) {
  const Pack square = x * x;
  const Pack u = (x + x * square * kGeluCube) * (-2 * kGeluSlope);
  const Pack s = 1.0f / (exp_of(u) + 1.0f);
  const Pack slope = (square * (3 * kGeluCube) + 1.0f) * (2 * kGeluSlope);
  return s + x * s * (1.0f - s) * slope;
}

template <class T>
struct GeluForward {
  RowsShape shape;
  Rows<const T> x;
  Rows<T> out;
};

template <class T>
FLUX_PACK_FUNCTION void gelu_row(const GeluForward<T>& a,
                                 int64_t row,
                                 int64_t lane,
                                 int64_t lanes) {
  const T* x = a.x.at(a.shape, row);
  T* out = a.out.at(a.shape, row);
  for_packs(a.shape.width, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
    save(gelu_of(load(x + i, part)), out + i, part);
  });
}

template <class T>
struct GeluBackward {
  RowsShape shape;
  Rows<const T> grad, x;
  Rows<T> grad_x;
};

template <class T>
FLUX_PACK_FUNCTION void gelu_backward_row(const GeluBackward<T>& a,
                                          int64_t row,
                                          int64_t lane,
                                          int64_t lanes) {
  const T *grad = a.grad.at(a.shape, row), *x = a.x.at(a.shape, row);
  T* grad_x = a.grad_x.at(a.shape, row);
  for_packs(a.shape.width, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
    save(load(grad + i, part) * gelu_slope(load(x + i, part)), grad_x + i, part);
  });
}

// --- the loss: of d = prediction - target, summed over groups of rows

/// Written so that small differences do not cancel: sqrt(d^2 + c^2) - c = d^2 / (sqrt(d^2 + c^2) + c).
FLUX_PACK_FUNCTION Pack loss_of(LossType type, Pack d, float c) {
  if (type == LossType::kL2) return d * d;
  if (type == LossType::kL1) return d * sign_of(d) + (d - d);  // NaN stays
  const Pack square = d * d;
  const Pack root = sqrt_of(square + c * c);
  return square / (root + c) * (type == LossType::kHuber ? 2 * c : 2.0f);
}
FLUX_PACK_FUNCTION Pack loss_slope(LossType type, Pack d, float c) {
  if (type == LossType::kL2) return d * 2.0f;
  if (type == LossType::kL1) return sign_of(d);
  return d / sqrt_of(d * d + c * c) * (type == LossType::kHuber ? 2 * c : 2.0f);
}

template <class T>
struct LossForward {
  RowsShape shape;
  Rows<const T> prediction;
  Rows<const float> target, mask;  // mask null: ones
  const float* c;                  // [samples]
  LossType type;
  float* sums;  // [groups]
};

template <class T, class Sum>
FLUX_PACK_FUNCTION void loss_group(
    const LossForward<T>& a, int64_t index, int64_t lane, int64_t lanes, const Sum& sum) {
  const float c = a.c[index / a.shape.groups_per_sample()];
  Pack total = zeros();
  for_rows_of_group(a.shape, index, [&](int64_t row) FLUX_PACK_LAMBDA {
    const T* prediction = a.prediction.at(a.shape, row);
    const float *target = a.target.at(a.shape, row),
                *mask = a.mask.data ? a.mask.at(a.shape, row) : nullptr;
    for_packs(a.shape.width, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
      // what lies beyond the row differs by zero
      Pack loss = loss_of(a.type, load(prediction + i, part) - load(target + i, part), c);
      if (mask) loss = loss * load(mask + i, part);
      total = total + loss;
    });
  });
  const float result = sum(sum_of(total));
  if (lane == 0) a.sums[index] = result;
}

template <class T>
struct LossBackward {
  RowsShape shape;
  const float* grad;  // [samples]
  Rows<const T> prediction;
  Rows<const float> target, mask;
  const float* c;
  LossType type;
  Rows<T> grad_prediction;
};

template <class T>
FLUX_PACK_FUNCTION void loss_backward_row(const LossBackward<T>& a,
                                          int64_t row,
                                          int64_t lane,
                                          int64_t lanes) {
  const T* prediction = a.prediction.at(a.shape, row);
  const float *target = a.target.at(a.shape, row),
              *mask = a.mask.data ? a.mask.at(a.shape, row) : nullptr;
  const float c = a.c[row / a.shape.tokens], grad = a.grad[row / a.shape.tokens];
  T* out = a.grad_prediction.at(a.shape, row);
  for_packs(a.shape.width, lane, lanes, [&](int64_t i, auto part) FLUX_PACK_LAMBDA {
    Pack slope = loss_slope(a.type, load(prediction + i, part) - load(target + i, part), c) * grad;
    if (mask) slope = slope * load(mask + i, part);
    save(slope, out + i, part);
  });
}

}  // namespace flux::kernel
