// common/ops/qk_norm_rope_kernel.h - index logic and arithmetic of qk_norm_rope, one text for the
// CPU and the CUDA kernel. No LibTorch: pointers, counts and strides.
//
// The work is a list of rows: one head of q, k or v of one token. `lanes` threads share a row (32
// on a GPU, 1 on a CPU); thread `lane` takes the pairs lane, lane + lanes, ... and `sum` adds a
// value over the threads of the row.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FLUX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLUX_HOST_DEVICE inline
#endif

namespace flux::kernel {

struct QkNormRopeShape {
  int64_t batch = 0, tokens = 0, heads = 0, head = 0;
  int64_t batch_stride = 0, token_stride = 0;  // of qkv, in elements
  int64_t rope_batch_stride = 0;               // 0: one table for all samples
  float eps = 0;

  FLUX_HOST_DEVICE int64_t num_rows() const { return batch * tokens * 3 * heads; }
};

/// Where row `index` lies. Rows are ordered by sample, token, part (q, k, v) and head.
struct QkNormRopeRow {
  int64_t part;    // 0 q, 1 k, 2 v
  int64_t packed;  // offset in qkv
  int64_t dense;   // offset in a contiguous [B, N, 3, heads, head]
  int64_t split;   // offset in a contiguous [B, N, heads, head]
  int64_t rope;    // offset in the tables

  FLUX_HOST_DEVICE QkNormRopeRow(const QkNormRopeShape& s, int64_t index) {
    const int64_t head_index = index % s.heads;
    part = index / s.heads % 3;
    const int64_t token = index / (3 * s.heads) % s.tokens;
    const int64_t sample = index / (3 * s.heads) / s.tokens;
    packed =
        sample * s.batch_stride + token * s.token_stride + (part * s.heads + head_index) * s.head;
    dense = index * s.head;
    split = ((sample * s.tokens + token) * s.heads + head_index) * s.head;
    rope = sample * s.rope_batch_stride + token * (s.head / 2);
  }
};

template <class T>
struct QkNormRopeForward {
  QkNormRopeShape shape;
  const T* qkv;
  const float* scale[2];  // of q and k: [head]
  const float *cos, *sin;
  T* out[3];
};

/// 1 / sqrt(mean(x^2) + eps) of one row.
template <class T, class Sum>
FLUX_HOST_DEVICE float inverse_rms(
    const T* x, int64_t head, float eps, int64_t lane, int64_t lanes, const Sum& sum) {
  float even = 0, odd = 0;
  for (int64_t i = 2 * lane; i < head; i += 2 * lanes) {
    const float x0 = static_cast<float>(x[i]), x1 = static_cast<float>(x[i + 1]);
    even += x0 * x0;
    odd += x1 * x1;
  }
  return 1.0f / sqrtf(sum(even + odd) / static_cast<float>(head) + eps);
}

template <class T, class Sum>
FLUX_HOST_DEVICE void forward_row(
    const QkNormRopeForward<T>& a, int64_t index, int64_t lane, int64_t lanes, const Sum& sum) {
  const QkNormRopeRow row(a.shape, index);
  const int64_t head = a.shape.head;
  const T* x = a.qkv + row.packed;
  T* out = a.out[row.part] + row.split;
  if (row.part == 2) {
    for (int64_t i = lane; i < head; i += lanes) out[i] = x[i];
    return;
  }
  const float r = inverse_rms(x, head, a.shape.eps, lane, lanes, sum);
  const float* scale = a.scale[row.part];
  const float *cos = a.cos + row.rope, *sin = a.sin + row.rope;
  for (int64_t pair = lane; pair < head / 2; pair += lanes) {
    const int64_t i = 2 * pair;
    const float z0 = static_cast<float>(x[i]) * r * scale[i];
    const float z1 = static_cast<float>(x[i + 1]) * r * scale[i + 1];
    out[i] = static_cast<T>(cos[pair] * z0 - sin[pair] * z1);
    out[i + 1] = static_cast<T>(sin[pair] * z0 + cos[pair] * z1);
  }
}

template <class T>
struct QkNormRopeBackward {
  QkNormRopeShape shape;
  const T* qkv;
  const float* scale[2];
  const float *cos, *sin;
  const T* grad_out[3];  // contiguous [B, N, heads, head]
  T* grad_qkv;           // contiguous [B, N, 3, heads, head]
  float* grad_scale;     // zeros [groups, 2, head], or null: not wanted
  int64_t rows_per_group;

  FLUX_HOST_DEVICE int64_t num_groups() const {
    return (shape.num_rows() + rows_per_group - 1) / rows_per_group;
  }
};

/// With n = x r, z = n scale and y = R z for the rotation R: dz = R^T dy, dscale = dz n, and with u
/// = dz scale dx = r (u - n mean(u n)).
template <class T, class Sum>
FLUX_HOST_DEVICE void backward_row(const QkNormRopeBackward<T>& a,
                                   int64_t index,
                                   float* grad_scale,
                                   int64_t lane,
                                   int64_t lanes,
                                   const Sum& sum) {
  const QkNormRopeRow row(a.shape, index);
  const int64_t head = a.shape.head;
  const T* x = a.qkv + row.packed;
  const T* grad = a.grad_out[row.part] + row.split;
  T* out = a.grad_qkv + row.dense;
  if (row.part == 2) {
    for (int64_t i = lane; i < head; i += lanes) out[i] = grad[i];
    return;
  }
  const float r = inverse_rms(x, head, a.shape.eps, lane, lanes, sum);
  const float* scale = a.scale[row.part];
  const float *cos = a.cos + row.rope, *sin = a.sin + row.rope;
  float* grad_of_scale = grad_scale ? grad_scale + row.part * head : nullptr;
  float dot = 0;
  for (int64_t pair = lane; pair < head / 2; pair += lanes) {
    const int64_t i = 2 * pair;
    const float y0 = static_cast<float>(grad[i]), y1 = static_cast<float>(grad[i + 1]);
    const float n0 = static_cast<float>(x[i]) * r, n1 = static_cast<float>(x[i + 1]) * r;
    const float z0 = cos[pair] * y0 + sin[pair] * y1, z1 = cos[pair] * y1 - sin[pair] * y0;
    if (grad_of_scale) {
      grad_of_scale[i] += z0 * n0;
      grad_of_scale[i + 1] += z1 * n1;
    }
    dot += z0 * scale[i] * n0 + z1 * scale[i + 1] * n1;
  }
  const float mean = sum(dot) / static_cast<float>(head);
  for (int64_t pair = lane; pair < head / 2; pair += lanes) {
    const int64_t i = 2 * pair;
    const float y0 = static_cast<float>(grad[i]), y1 = static_cast<float>(grad[i + 1]);
    const float n0 = static_cast<float>(x[i]) * r, n1 = static_cast<float>(x[i + 1]) * r;
    const float z0 = cos[pair] * y0 + sin[pair] * y1, z1 = cos[pair] * y1 - sin[pair] * y0;
    out[i] = static_cast<T>(r * (z0 * scale[i] - n0 * mean));
    out[i + 1] = static_cast<T>(r * (z1 * scale[i + 1] - n1 * mean));
  }
}

/// The rows of one group, in order: their share of the scales' gradient has one owner, so the
/// result has no race and does not depend on how many groups run at once.
template <class T, class Sum>
FLUX_HOST_DEVICE void backward_group(
    const QkNormRopeBackward<T>& a, int64_t group, int64_t lane, int64_t lanes, const Sum& sum) {
  const int64_t first = group * a.rows_per_group, rows = a.shape.num_rows();
  const int64_t last = first + a.rows_per_group < rows ? first + a.rows_per_group : rows;
  float* grad_scale = a.grad_scale ? a.grad_scale + group * 2 * a.shape.head : nullptr;
  for (int64_t index = first; index < last; ++index)
    backward_row(a, index, grad_scale, lane, lanes, sum);
}

}  // namespace flux::kernel
