#include "common/ops/product_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>

#include "common/ops/pack.h"

#if defined(__x86_64__)
// GCC 12 sees an uninitialised value in its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#define FLUX_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#endif
// An address sanitizer is not ready yet when the loader picks a version.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define FLUX_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define FLUX_CLONES
#endif

namespace flux::kernel {
namespace {

int64_t rounded(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
int64_t parts(int64_t value, int64_t of) { return (value + of - 1) / of; }

}  // namespace

Bf16Plan::Bf16Plan(
    Bf16Kernel which, int64_t m, int64_t k, int64_t n, int64_t r, bool dense, int64_t threads)
    : kernel(which), pack_a(which == Bf16Kernel::kPairs && !dense) {
  constexpr int64_t kPairsDepth = 1536, kFloatDepth = 256;
  rows = std::max<int64_t>(rounded(parts(m, std::max<int64_t>(parts(m, kRows), 1)), 32), 32);
  width = std::min(rounded(n, 16), kColumns);
  const int64_t blocks = std::max<int64_t>(parts(n, width), 1);
  row_parts = blocks >= 2 * threads ? 1 : parts(2 * threads, blocks);
  part_rows = std::max<int64_t>(rounded(parts(rows, row_parts), 32), 32);
  row_parts = parts(rows, part_rows);
  const bool pairs = kernel == Bf16Kernel::kPairs;
  depth = std::min(pairs ? kPairsDepth : kFloatDepth, rounded(std::max(k, r), 2));
  packed = pairs ? rounded(depth * width * 2, 64) : depth * (width + kFloatRows) * 4;
  sums = rounded(part_rows * width * 4, 64);
  packed_a = pack_a ? rounded(rows * rounded(std::max(k, r), 2) * 2, 64) : 0;
}

namespace {

template <class T>
void transpose_blocks(
    const T* from, int64_t stride, int64_t columns, int64_t first, int64_t last, T* to) {
  constexpr int64_t kBlock = 16;  // a cache line of float32
  for (int64_t j = 0; j < columns; j += kBlock)
    for (int64_t i = first; i < last; i += kBlock)
      for (int64_t x = i; x < std::min(i + kBlock, last); ++x)
        for (int64_t y = j; y < std::min(j + kBlock, columns); ++y)
          to[x * columns + y] = from[y * stride + x];
}

}  // namespace

void transpose_cpu(const uint16_t* from,
                   int64_t stride,
                   int64_t columns,
                   int64_t first,
                   int64_t last,
                   uint16_t* to) {
  transpose_blocks(from, stride, columns, first, last, to);
}
void transpose_cpu(
    const float* from, int64_t stride, int64_t columns, int64_t first, int64_t last, float* to) {
  transpose_blocks(from, stride, columns, first, last, to);
}

namespace {

#if defined(__x86_64__)

/// Two neighbours in K of one column: what the micro-kernel reads of b. Beyond the matrix there are zeros.
uint32_t pair_of(const Bf16Matrix& b, int64_t k, int64_t n) {
  if (n >= b.columns) return 0;
  const uint16_t* at = b.data + k * b.row + n * b.column;
  const uint32_t low = at[0];
  return k + 1 < b.rows ? low | uint32_t{at[b.row]} << 16 : low;
}

FLUX_AVX512 inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

/// Columns [n, n + width) and rows [k, k + depth) of b, in pairs: [depth / 2, width].
FLUX_AVX512 void pack_b(
    const Bf16Matrix& b, int64_t k, int64_t depth, int64_t n, int64_t width, uint32_t* out) {
  const int64_t pairs = depth / 2;
  const int64_t whole_pairs = std::min(pairs, (b.rows - k) / 2);  // both of the pair are there
  const int64_t whole_columns = std::min(width, b.columns - n);
  int64_t done_columns = 0, done_pairs = 0;
  if (b.row == 1) {
    done_columns = whole_columns / 16 * 16;
    done_pairs = whole_pairs / 16 * 16;
    for (int64_t j = 0; j < done_columns; j += 16)
      for (int64_t i = 0; i < done_pairs; i += 16) {
        __m512i r[16];
        for (int x = 0; x < 16; ++x)
          r[x] = _mm512_loadu_si512(b.data + k + 2 * i + (n + j + x) * b.column);
        transpose(r);
        for (int x = 0; x < 16; ++x) _mm512_storeu_si512(out + (i + x) * width + j, r[x]);
      }
  } else {
    done_columns = whole_columns / 16 * 16;
    done_pairs = whole_pairs;
    for (int64_t i = 0; i < done_pairs; ++i) {
      const uint16_t *low = b.data + (k + 2 * i) * b.row + n, *high = low + b.row;
      for (int64_t j = 0; j < done_columns; j += 16) {
        const __m512i x =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + j)));
        const __m512i y =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + j)));
        _mm512_storeu_si512(out + i * width + j, _mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
      }
    }
  }
  for (int64_t i = 0; i < pairs; ++i)
    for (int64_t j = i < done_pairs ? done_columns : 0; j < width; ++j)
      out[i * width + j] = pair_of(b, k + 2 * i, n + j);
}

/// Row [m] of a, from 0 to K and with zeros to the even `depth`.
void pack_row(const Bf16Matrix& a, int64_t m, int64_t first, int64_t depth, uint16_t* out) {
  for (int64_t k = first; k < depth; ++k)
    out[k] = k < a.columns ? a.data[m * a.row + k * a.column] : uint16_t{0};
}

/// Rows [m, m + rows) of a, dense, `depth` numbers each.
FLUX_AVX512 void pack_a(
    const Bf16Matrix& a, int64_t m, int64_t rows, int64_t depth, uint16_t* out) {
  int64_t done_rows = 0, done_depth = 0;
  if (a.row == 1) {
    done_rows = rows / 16 * 16;
    done_depth = a.columns / 32 * 32;
    for (int64_t i = 0; i < done_rows; i += 16)
      for (int64_t k = 0; k < done_depth; k += 32) {
        __m512i r[16];
        for (int x = 0; x < 16; ++x) {
          const uint16_t* low = a.data + m + i + (k + 2 * x) * a.column;
          const __m512i y =
              _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
          const __m512i z = _mm512_cvtepu16_epi32(
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + a.column)));
          r[x] = _mm512_or_si512(y, _mm512_slli_epi32(z, 16));
        }
        transpose(r);
        for (int x = 0; x < 16; ++x) _mm512_storeu_si512(out + (i + x) * depth + k, r[x]);
      }
  }
  for (int64_t i = 0; i < rows; ++i)
    pack_row(a, m + i, i < done_rows ? done_depth : 0, depth, out + i * depth);
}

#endif

/// Rounds sums [rows, width] into out.
FLUX_CLONES void store_sums(const float* sums,
                            int64_t rows,
                            int64_t width,
                            int64_t columns,
                            const uint16_t* bias,
                            uint16_t* out,
                            int64_t out_row) {
  for (int64_t i = 0; i < rows; ++i)
    for_packs(columns, 0, 1, [&](int64_t j, auto part) FLUX_PACK_LAMBDA {
      Pack value = load(sums + i * width + j, part);
      if (bias) value = value + load(reinterpret_cast<const Bf16Bits*>(bias) + j, part);
      save(value, reinterpret_cast<Bf16Bits*>(out + i * out_row) + j, part);
    });
}

FLUX_CLONES void scale_sums(float* sums, int64_t count, float scale) {
  for (int64_t i = 0; i < count; ++i) sums[i] *= scale;
}

#if defined(__x86_64__)

const at::BFloat16* as_bf16(const void* data) { return static_cast<const at::BFloat16*>(data); }

/// One matrix product's share of the sums of all rows of `a` and columns [n, n + width).
void add_pairs(const Bf16Plan& plan,
               const Bf16Matrix& a,
               const Bf16Matrix& b,
               int64_t n,
               int64_t width,
               bool add,
               uint32_t* packed,
               float* sums) {
  constexpr int64_t kRowsAtOnce = 128, kPanel = 128;
  const int64_t k_even = rounded(a.columns, 2);
  for (int64_t k = 0; k < k_even; k += plan.depth) {
    const int64_t depth = std::min(plan.depth, k_even - k);
    for (int64_t panel = 0; panel < width; panel += kPanel)
      pack_b(b, k, depth, n + panel, std::min(kPanel, width - panel), packed + panel * (depth / 2));
    for (int64_t i = 0; i < a.rows; i += kRowsAtOnce)
      for (int64_t panel = 0; panel < width; panel += kPanel)
        at::native::cpublas::brgemm(std::min(kRowsAtOnce, a.rows - i),
                                    std::min(kPanel, width - panel),
                                    depth,
                                    a.row,
                                    std::min(kPanel, width - panel),
                                    width,
                                    add || k > 0,
                                    as_bf16(a.data + i * a.row + k),
                                    as_bf16(packed + panel * (depth / 2)),
                                    sums + i * width + panel);
  }
}

/// Whether LibTorch's micro-kernel multiplies pairs: without the instructions, or where they are forbidden, it takes
/// another path that reads b in another order, or throws.
bool multiplies_pairs() {
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return false;
  if (at::native::cpublas::could_pack(at::kBFloat16)) return true;
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  const at::BFloat16 a[2] = {1, 2};
  at::BFloat16 b[32];
  for (int j = 0; j < 32; ++j) b[j] = static_cast<float>(j);
  float sums[16] = {};
  try {
    at::native::cpublas::brgemm(1, 16, 2, 2, 16, 16, false, a, b, sums);
    at::native::cpublas::brgemm_release();
  } catch (const std::exception&) {
    return false;
  }
  for (int j = 0; j < 16; ++j)
    if (sums[j] != static_cast<float>(2 * j + 2 * (2 * j + 1))) return false;
  return true;
}

#endif

std::atomic<bool> limited = false;

/// The same for the project's own micro-kernel.
void add_floats(const Bf16Plan& plan,
                const Bf16Matrix& a,
                const Bf16Matrix& b,
                int64_t n,
                int64_t width,
                bool add,
                float* packed,
                float* sums) {
  float* const rows = packed + plan.depth * plan.width;
  for (int64_t k = 0; k < a.columns; k += plan.depth) {
    const int64_t depth = std::min(plan.depth, a.columns - k);
    for (int64_t j = 0; j < width; j += kFloatColumns)
      widen_columns(b, k, depth, n + j, packed + j * depth);
    for (int64_t i = 0; i < a.rows; i += kFloatRows) {
      const int64_t count = std::min(kFloatRows, a.rows - i);
      widen_rows(a, i, count, k, depth, rows);
      for (int64_t j = 0; j < width; j += kFloatColumns)
        multiply_floats(
            rows, packed + j * depth, count, depth, add || k > 0, sums + i * width + j, width);
    }
  }
}

}  // namespace

Bf16Kernel bf16_kernel() {
#if defined(__x86_64__)
  static const bool pairs = multiplies_pairs();
  if (pairs && !limited) return Bf16Kernel::kPairs;
#endif
  return Bf16Kernel::kFloat;
}
void limit_bf16_kernel(bool limit) { limited = limit; }

void multiply_bf16(const Bf16Product& p, const Bf16Plan& plan, int64_t threads, void* scratch) {
  auto* const packed_a = static_cast<uint16_t*>(scratch);
  auto* const of_threads = static_cast<std::byte*>(scratch) + plan.packed_a;
  const int64_t m_all = p.a.rows, n_all = p.b.columns;
  const int64_t depth = rounded(p.a.columns, 2);
  const bool second = p.c.rows > 0;
  for (int64_t m = 0; m < m_all; m += plan.rows) {
    const int64_t rows = std::min(plan.rows, m_all - m);
#if defined(__x86_64__)
    if (plan.pack_a)
      at::parallel_for(0, parts(rows, 16), 4, [&](int64_t first, int64_t last) {
        pack_a(p.a,
               m + first * 16,
               std::min(last * 16, rows) - first * 16,
               depth,
               packed_a + first * 16 * depth);
      });
#endif
    const int64_t blocks = parts(n_all, plan.width);
    at::parallel_for(0, blocks * plan.row_parts, 1, [&](int64_t first, int64_t last) {
      std::byte* mine = of_threads + (at::get_thread_num() % threads) * (plan.packed + plan.sums);
      auto* sums = reinterpret_cast<float*>(mine + plan.packed);
      for (int64_t task = first; task < last; ++task) {
        const int64_t n = task / plan.row_parts * plan.width;
        const int64_t i = task % plan.row_parts * plan.part_rows;
        if (i >= rows) continue;
        const int64_t count = std::min(plan.part_rows, rows - i);
        const int64_t columns = std::min(plan.width, n_all - n), width = rounded(columns, 16);
        const auto rows_of = [&](const Bf16Matrix& x) {
          return Bf16Matrix{x.data + (m + i) * x.row, count, x.columns, x.row, x.column};
        };
        const auto add = [&](const Bf16Matrix& a, const Bf16Matrix& b, bool to_sums) {
#if defined(__x86_64__)
          if (plan.kernel == Bf16Kernel::kPairs)
            return add_pairs(
                plan, a, b, n, width, to_sums, reinterpret_cast<uint32_t*>(mine), sums);
#endif
          add_floats(plan, a, b, n, width, to_sums, reinterpret_cast<float*>(mine), sums);
        };
        add(plan.pack_a ? Bf16Matrix{packed_a + i * depth, count, depth, depth, 1} : rows_of(p.a),
            p.b,
            false);
        if (p.scale != 1) scale_sums(sums, count * width, p.scale);
        if (second) add(rows_of(p.c), p.d, true);
        store_sums(sums,
                   count,
                   width,
                   columns,
                   p.bias ? p.bias + n : nullptr,
                   p.out + (m + i) * n_all + n,
                   n_all);
      }
#if defined(__x86_64__)
      if (plan.kernel == Bf16Kernel::kPairs) at::native::cpublas::brgemm_release();
#endif
    });
  }
}

}  // namespace flux::kernel
