#include <algorithm>

#include "common/optim/optimizer_cuda.h"

namespace flux {
namespace {

// A warp takes 256 elements at a time, element 32 k + lane in turn k: a block of 8-bit states, and as
// many random numbers as 32 Philox blocks hold.
constexpr int kTurns = 8;
constexpr int kWarp = 32, kThreads = 256;
constexpr int64_t kWarpTile = kTurns * kWarp;
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int64_t kMaxBlocks = 4096;  // enough to fill any GPU; loops take the rest

unsigned blocks_for(int64_t items, int64_t items_per_block) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((items + items_per_block - 1) / items_per_block, 1, kMaxBlocks));
}
unsigned blocks_of_warps(int64_t n) {
  return blocks_for((n + kWarpTile - 1) / kWarpTile, kThreads / kWarp);
}

/// f(first element, lane) for every tile of the warp.
template <class F>
__device__ void for_tiles(int64_t n, F f) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarp);
  for (int64_t tile = int64_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp;
       tile * kWarpTile < n;
       tile += warps)
    f(tile * kWarpTile, lane);
}

__device__ float gradient_at(const Operands& o, int64_t i) {
  const float g = o.gradient_bf16 ? to_float(static_cast<const uint16_t*>(o.gradient)[i])
                                  : static_cast<const float*>(o.gradient)[i];
  return g * o.gradient_scale;
}

__device__ float weight_at(const Operands& o, int64_t i) {
  if (o.keep == Keep::kFloat) return static_cast<const float*>(o.parameter)[i];
  if (o.keep == Keep::kMaster && !o.first) return static_cast<const float*>(o.extra)[i];
  const float p = to_float(static_cast<const uint16_t*>(o.parameter)[i]);
  return o.keep == Keep::kKahan ? p + to_float(static_cast<const uint16_t*>(o.extra)[i]) : p;
}

__device__ void keep_weight(const Operands& o, int64_t i, float value, uint32_t random) {
  auto* const p = static_cast<uint16_t*>(o.parameter) + i;
  switch (o.keep) {
    case Keep::kFloat:
      static_cast<float*>(o.parameter)[i] = value;
      return;
    case Keep::kNearest:
    case Keep::kPlain:
      return round_to(value, p);
    case Keep::kStochastic:
      *p = round_stochastic(value, random);
      return;
    case Keep::kKahan:
      round_to(value, p);
      return round_to(value - to_float(*p), static_cast<uint16_t*>(o.extra) + i);
    case Keep::kMaster:
      static_cast<float*>(o.extra)[i] = value;
      return round_to(value, p);
  }
}

__device__ float moment_at(const Operands& o, int which, int64_t i) {
  return o.states_bf16 ? to_float(static_cast<const uint16_t*>(o.states[which])[i])
                       : static_cast<const float*>(o.states[which])[i];
}
__device__ void keep_moment(const Operands& o, int which, int64_t i, float value) {
  if (o.states_bf16)
    round_to(value, static_cast<uint16_t*>(o.states[which]) + i);
  else
    static_cast<float*>(o.states[which])[i] = value;
}

/// The random numbers of a tile: lane L makes Philox block L of its 32.
struct TileRandom {
  uint32_t words[4] = {0, 0, 0, 0};

  __device__ TileRandom(const Operands& o, int64_t begin, int lane) {
    if (o.keep != Keep::kStochastic) return;
    const uint64_t block =
        static_cast<uint64_t>(o.offset + begin) / 8 + static_cast<uint64_t>(lane);
    words[0] = static_cast<uint32_t>(block);
    words[1] = static_cast<uint32_t>(block >> 32);
    words[2] = o.key.high[0];
    words[3] = o.key.high[1];
    philox_block(words[0], words[1], words[2], words[3], o.key.key[0], o.key.key[1]);
  }
  /// Of element 32 turn + lane. All lanes ask.
  __device__ uint32_t of(int turn, int lane) const {
    const int from = 4 * turn + lane / 8, word = lane % 8 / 2;
    uint32_t mine = 0;
    for (int w = 0; w < 4; ++w) {
      const uint32_t there = __shfl_sync(kAll, words[w], from);
      if (w == word) mine = there;
    }
    return mine >> (lane % 2 * 16) & 0xFFFFu;
  }
};

/// The update of an element, and how many states it looks at.
__device__ void update_element(
    const Operands& o, const AdamWScalars& s, float* p, float g, float* m, float* v) {
  if (o.keep == Keep::kPlain)
    adamw_values<uint16_t>(p, g, m, v, s);
  else
    adamw_values<float>(p, g, m, v, s);
}
__device__ void update_element(
    const Operands& o, const LionScalars& s, float* p, float g, float* m, float*) {
  if (o.keep == Keep::kPlain)
    lion_values<uint16_t>(p, g, m, s);
  else
    lion_values<float>(p, g, m, s);
}
__device__ void update_element(
    const Operands&, const SgdScalars& s, float* p, float g, float* m, float*) {
  sgd_values(p, g, m, s);
}
__device__ void update_element(
    const Operands&, const ScheduleFreeScalars& s, float* y, float g, float* z, float* v) {
  schedule_free_values(y, g, z, v, s);
}
__device__ void update_element(
    const Operands&, const ProdigyScalars& s, float* p, float, float* m, float* v) {
  prodigy_values(p, *m, *v, s);
}
__device__ void update_element(
    const Operands&, const EmaScalars& s, float* p, float g, float*, float*) {
  ema_values(p, g, s);
}

template <int kStates, class Scalars>
__global__ void element_kernel(Operands o, Scalars s) {
  for_tiles(o.n, [&](int64_t begin, int lane) {
    const TileRandom random(o, begin, lane);
    for (int turn = 0; turn < kTurns; ++turn) {
      const uint32_t r = random.of(turn, lane);
      const int64_t i = begin + turn * kWarp + lane;
      if (i >= o.n) continue;
      float p = weight_at(o, i), a = 0, b = 0;
      if (kStates > 0) a = moment_at(o, 0, i);
      if (kStates > 1) b = moment_at(o, 1, i);
      update_element(o, s, &p, gradient_at(o, i), &a, &b);
      if (kStates > 0) keep_moment(o, 0, i, a);
      if (kStates > 1) keep_moment(o, 1, i, b);
      keep_weight(o, i, p, r);
    }
  });
}

template <int kStates, class Scalars>
cudaError_t launch(const Operands& o, const Scalars& scalars, cudaStream_t stream) {
  element_kernel<kStates><<<blocks_of_warps(o.n), kThreads, 0, stream>>>(o, scalars);
  return cudaGetLastError();
}

__device__ float warp_max(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

__global__ void adamw8bit_kernel(
    Operands o, float* absmax1, float* absmax2, const Map8* maps, AdamW8bitScalars s) {
  auto *const codes1 = static_cast<uint8_t*>(o.states[0]), *const codes2 =
                                                               static_cast<uint8_t*>(o.states[1]);
  for_tiles(o.n, [&](int64_t begin, int lane) {
    const int64_t block = begin / kBlock8;
    const TileRandom random(o, begin, lane);
    const float scale1 = absmax1[block], scale2 = absmax2[block];
    float m[kTurns], v[kTurns], largest1 = 0, largest2 = 0;
    for (int turn = 0; turn < kTurns; ++turn) {
      const uint32_t r = random.of(turn, lane);
      const int64_t i = begin + turn * kWarp + lane;
      m[turn] = v[turn] = 0;
      if (i >= o.n) continue;
      m[turn] = maps[0].values[codes1[i]] * scale1;
      v[turn] = maps[1].values[codes2[i]] * scale2;
      adamw8bit_moments(gradient_at(o, i), m + turn, v + turn, s);
      keep_weight(o, i, adamw8bit_weight(weight_at(o, i), m[turn], v[turn], s), r);
      largest1 = fmaxf(largest1, fabsf(m[turn]));
      largest2 = fmaxf(largest2, fabsf(v[turn]));
    }
    largest1 = warp_max(largest1);
    largest2 = warp_max(largest2);
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t i = begin + turn * kWarp + lane;
      if (i >= o.n) continue;
      codes1[i] = nearest8(m[turn] / (largest1 > 0 ? largest1 : 1), maps[0].cells);
      codes2[i] = nearest8(v[turn] / (largest2 > 0 ? largest2 : 1), maps[1].cells);
    }
    if (lane == 0) {
      absmax1[block] = largest1;
      absmax2[block] = largest2;
    }
  });
}

__global__ void adamw8bit_small_kernel(Operands o, AdamW8bitScalars s) {
  for_tiles(o.n, [&](int64_t begin, int lane) {
    const TileRandom random(o, begin, lane);
    for (int turn = 0; turn < kTurns; ++turn) {
      const uint32_t r = random.of(turn, lane);
      const int64_t i = begin + turn * kWarp + lane;
      if (i >= o.n) continue;
      float *const m = static_cast<float*>(o.states[0]) + i, *const v =
                                                                 static_cast<float*>(o.states[1]) +
                                                                 i;
      adamw8bit_moments(gradient_at(o, i), m, v, s);
      keep_weight(o, i, adamw8bit_small_weight(weight_at(o, i), *m, *v, s), r);
    }
  });
}

// --- Adafactor

/// The sum over all threads of a block, to all of them; the order is fixed.
__device__ double block_sum(double x) {
  __shared__ double all[kThreads];
  __syncthreads();  // an earlier sum may still be read
  all[threadIdx.x] = x;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) all[threadIdx.x] += all[threadIdx.x + half];
    __syncthreads();
  }
  return all[0];
}

/// A block a part of Prodigy's sums.
__global__ void prodigy_observe_kernel(Operands o, ProdigyScalars s, double* sums) {
  for (int64_t part = blockIdx.x; part * kProdigyPart < o.n; part += gridDim.x) {
    const int64_t begin = part * kProdigyPart, limit = begin + kProdigyPart,
                  end = limit < o.n ? limit : o.n;
    double dot = 0, size = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      float m = moment_at(o, 0, i), v = moment_at(o, 1, i);
      float *const sum = static_cast<float*>(o.states[2]) + i, *const p0 = static_cast<float*>(
                                                                               o.states[3]) +
                                                                           i;
      const float p = weight_at(o, i);
      // the step that follows may be left out
      if (o.keep == Keep::kMaster && o.first) static_cast<float*>(o.extra)[i] = p;
      dot += static_cast<double>(prodigy_observed(p, gradient_at(o, i), &m, &v, sum, p0, s));
      size += static_cast<double>(fabsf(*sum));
      keep_moment(o, 0, i, m);
      keep_moment(o, 1, i, v);
    }
    dot = block_sum(dot);
    size = block_sum(size);
    if (threadIdx.x == 0) {
      sums[2 * part] = dot;
      sums[2 * part + 1] = size;
    }
  }
}

/// A block a row, of all matrices.
__global__ void row_kernel(Operands o, AdafactorShape shape, AdafactorScalars s, float* row_means) {
  for (int64_t row = blockIdx.x; row < shape.batch * shape.rows; row += gridDim.x) {
    double sum = 0;
    for (int64_t c = threadIdx.x; c < shape.columns; c += blockDim.x) {
      const float g = gradient_at(o, row * shape.columns + c);
      sum += static_cast<double>(g * g + s.eps1);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0)
      row_means[row] = adafactor_mean(
          row_means[row], static_cast<float>(sum / static_cast<double>(shape.columns)), s);
  }
}

/// A thread a column and group of rows: column sums aside.
__global__ void column_group_kernel(
    Operands o, AdafactorShape shape, AdafactorScalars s, int64_t group, float* column_sums) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= shape.columns) return;
  const int64_t begin = blockIdx.y * group, limit = begin + group;
  const int64_t end = limit < shape.rows ? limit : shape.rows;
  float sum = 0;
  for (int64_t row = begin; row < end; ++row) {
    const float g = gradient_at(o, row * shape.columns + c);
    sum += g * g + s.eps1;
  }
  column_sums[blockIdx.y * shape.columns + c] = sum;
}

__global__ void column_mean_kernel(const float* column_sums,
                                   int64_t groups,
                                   AdafactorShape shape,
                                   AdafactorScalars s,
                                   float* column_means) {
  for (int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; c < shape.columns;
       c += int64_t{gridDim.x} * blockDim.x) {
    double sum = 0;
    for (int64_t group = 0; group < groups; ++group)
      sum += static_cast<double>(column_sums[group * shape.columns + c]);
    column_means[c] = adafactor_mean(
        column_means[c], static_cast<float>(sum / static_cast<double>(shape.rows)), s);
  }
}

/// A thread a column, of all matrices: where there are many matrices, or one is very wide.
__global__ void column_kernel(Operands o,
                              AdafactorShape shape,
                              AdafactorScalars s,
                              float* column_means) {
  const int64_t all = shape.batch * shape.columns;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < all;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t matrix = i / shape.columns, c = i % shape.columns;
    double sum = 0;
    for (int64_t row = 0; row < shape.rows; ++row) {
      const float g = gradient_at(o, (matrix * shape.rows + row) * shape.columns + c);
      sum += static_cast<double>(g * g + s.eps1);
    }
    column_means[i] = adafactor_mean(
        column_means[i], static_cast<float>(sum / static_cast<double>(shape.rows)), s);
  }
}

/// A block a matrix.
__global__ void mean_of_rows_kernel(AdafactorShape shape, const float* row_means, float* out) {
  for (int64_t matrix = blockIdx.x; matrix < shape.batch; matrix += gridDim.x) {
    double sum = 0;
    for (int64_t row = threadIdx.x; row < shape.rows; row += blockDim.x)
      sum += static_cast<double>(row_means[matrix * shape.rows + row]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[matrix] = static_cast<float>(sum / static_cast<double>(shape.rows));
  }
}

__global__ void inverse_root_kernel(const float* in, int64_t n, float* out) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x)
    out[i] = inverse_root(in[i]);
}

__device__ float update_of(const AdafactorFactors& f, int64_t i, float g) {
  if (f.full_means != nullptr) return inverse_root(f.full_means[i]) * g;
  const int64_t row = i / f.shape.columns, matrix = row / f.shape.rows,
                column = matrix * f.shape.columns + i % f.shape.columns;
  const float row_factor = inverse_root(f.row_means[row] / f.mean_row_means[matrix]);
  return adafactor_update(g,
                          row_factor,
                          f.inverse_root_columns != nullptr ? f.inverse_root_columns[column]
                                                            : inverse_root(f.column_means[column]));
}

/// A block a part: the sum of squared updates, or of squared weights.
__global__ void squares_kernel(
    Operands o, AdafactorFactors f, AdafactorScalars s, bool of_weights, double* sums) {
  for (int64_t part = blockIdx.x; part * kAdafactorPart < o.n; part += gridDim.x) {
    const int64_t begin = part * kAdafactorPart, limit = begin + kAdafactorPart,
                  end = limit < o.n ? limit : o.n;
    double sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      float x;
      if (of_weights) {
        x = weight_at(o, i);
      } else {
        const float g = gradient_at(o, i);
        if (f.full_means != nullptr)
          f.full_means[i] = adafactor_mean(f.full_means[i], g * g + s.eps1, s);
        x = update_of(f, i, g);
      }
      sum += static_cast<double>(x) * static_cast<double>(x);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[part] = sum;
  }
}

/// One block: the sum of every stride-th number.
__global__ void total_kernel(const double* sums, int64_t num, int64_t stride, double* total) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < num; i += blockDim.x) sum += sums[i * stride];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *total = sum;
}

__global__ void apply_kernel(Operands o,
                             AdafactorFactors f,
                             AdafactorScalars s,
                             const double* totals) {
  const AdafactorApply a = adafactor_apply(s, totals[0], totals[1], o.n);
  for_tiles(o.n, [&](int64_t begin, int lane) {
    const TileRandom random(o, begin, lane);
    for (int turn = 0; turn < kTurns; ++turn) {
      const uint32_t r = random.of(turn, lane);
      const int64_t i = begin + turn * kWarp + lane;
      if (i >= o.n) continue;
      float u = update_of(f, i, gradient_at(o, i)) / a.divisor * a.learning_rate;
      if (o.states[0] != nullptr) {
        u = moment_at(o, 0, i) * a.beta1 + a.one_minus_beta1 * u;
        keep_moment(o, 0, i, u);
      }
      float p = weight_at(o, i);
      p += a.decay * p;
      keep_weight(o, i, p - u, r);
    }
  });
}

}  // namespace

cudaError_t update_cuda(const Operands& o, const AdamWScalars& scalars, cudaStream_t stream) {
  return launch<2>(o, scalars, stream);
}
cudaError_t update_cuda(const Operands& o, const LionScalars& scalars, cudaStream_t stream) {
  return launch<1>(o, scalars, stream);
}
cudaError_t update_cuda(const Operands& o, const SgdScalars& scalars, cudaStream_t stream) {
  return launch<1>(o, scalars, stream);
}
cudaError_t update_cuda(const Operands& o,
                        const ScheduleFreeScalars& scalars,
                        cudaStream_t stream) {
  return launch<2>(o, scalars, stream);
}
cudaError_t update_cuda(const Operands& o, const ProdigyScalars& scalars, cudaStream_t stream) {
  return launch<2>(o, scalars, stream);
}
cudaError_t update_cuda(const Operands& o, const EmaScalars& scalars, cudaStream_t stream) {
  return launch<0>(o, scalars, stream);
}

cudaError_t prodigy_observe_cuda(const Operands& o,
                                 const ProdigyScalars& scalars,
                                 double* sums,
                                 cudaStream_t stream) {
  const int64_t parts = prodigy_num_parts(o.n);
  prodigy_observe_kernel<<<blocks_for(parts, 1), kThreads, 0, stream>>>(o, scalars, sums);
  for (int which = 0; which < 2; ++which)
    total_kernel<<<1, kThreads, 0, stream>>>(sums + which, parts, 2, sums + 2 * parts + which);
  return cudaGetLastError();
}

cudaError_t adamw8bit_update_cuda(const Operands& o,
                                  float* absmax1,
                                  float* absmax2,
                                  const Map8* maps,
                                  const AdamW8bitScalars& scalars,
                                  cudaStream_t stream) {
  adamw8bit_kernel<<<blocks_of_warps(o.n), kThreads, 0, stream>>>(
      o, absmax1, absmax2, maps, scalars);
  return cudaGetLastError();
}

cudaError_t adamw8bit_small_update_cuda(const Operands& o,
                                        const AdamW8bitScalars& scalars,
                                        cudaStream_t stream) {
  adamw8bit_small_kernel<<<blocks_of_warps(o.n), kThreads, 0, stream>>>(o, scalars);
  return cudaGetLastError();
}

cudaError_t adafactor_update_cuda(const Operands& o,
                                  const AdafactorFactors& factors,
                                  float* row_means,
                                  float* column_means,
                                  double* sums,
                                  float* floats,
                                  const AdafactorScalars& scalars,
                                  cudaStream_t stream) {
  AdafactorFactors f = factors;
  const AdafactorShape& shape = f.shape;
  if (f.full_means == nullptr) {
    float* const wide = floats + shape.batch;
    row_kernel<<<blocks_for(shape.batch * shape.rows, 1), kThreads, 0, stream>>>(
        o, shape, scalars, row_means);
    if (const int64_t group = adafactor_group(shape); group > 0) {
      const int64_t groups = (shape.rows + group - 1) / group;
      const dim3 grid(static_cast<unsigned>((shape.columns + kThreads - 1) / kThreads),
                      static_cast<unsigned>(groups));
      column_group_kernel<<<grid, kThreads, 0, stream>>>(o, shape, scalars, group, wide);
      column_mean_kernel<<<blocks_for(shape.columns, kThreads), kThreads, 0, stream>>>(
          wide, groups, shape, scalars, column_means);
    } else {
      column_kernel<<<blocks_for(shape.batch * shape.columns, kThreads), kThreads, 0, stream>>>(
          o, shape, scalars, column_means);
    }
    mean_of_rows_kernel<<<blocks_for(shape.batch, 1), kThreads, 0, stream>>>(
        shape, row_means, floats);
    f.row_means = row_means;
    f.mean_row_means = floats;
    f.column_means = column_means;
    if (const int64_t all = shape.batch * shape.columns; all <= kAdafactorColumns) {
      inverse_root_kernel<<<blocks_for(all, kThreads), kThreads, 0, stream>>>(
          column_means, all, wide);
      f.inverse_root_columns = wide;
    }
  }
  const int64_t parts = adafactor_num_parts(o.n);
  double* const totals = sums + parts;
  for (const bool of_weights : {false, true}) {
    if (of_weights && scalars.scale_parameter == 0) continue;
    squares_kernel<<<blocks_for(parts, 1), kThreads, 0, stream>>>(o, f, scalars, of_weights, sums);
    total_kernel<<<1, kThreads, 0, stream>>>(sums, parts, 1, totals + (of_weights ? 1 : 0));
  }
  apply_kernel<<<blocks_of_warps(o.n), kThreads, 0, stream>>>(o, f, scalars, totals);
  return cudaGetLastError();
}

}  // namespace flux
