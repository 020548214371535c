#include "common/optim/tile_simd.h"

#if defined(__x86_64__)
#include <immintrin.h>

// GCC 12 takes its own "undefined" operands in these intrinsics for ours
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define FLUX_AVX2 __attribute__((target("avx2")))
#define FLUX_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#endif

namespace flux {
namespace {

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

void random_plain(const RoundingKey& key, uint64_t first, int64_t blocks, uint16_t* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    const uint64_t counter = first + static_cast<uint64_t>(b);
    uint32_t words[4] = {static_cast<uint32_t>(counter),
                         static_cast<uint32_t>(counter >> 32),
                         key.high[0],
                         key.high[1]};
    philox_block(words[0], words[1], words[2], words[3], key.key[0], key.key[1]);
    for (int64_t i = 0; i < 8; ++i)
      out[8 * b + i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
  }
}

void decode_plain(const uint8_t* codes, float absmax, const float* map, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = map[codes[i]] * absmax;
}

void encode_plain(
    const float* values, float absmax, const uint32_t* cells, int64_t n, uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = nearest8(values[i] / absmax, cells);
}

#if defined(__x86_64__)

// Philox: one block a 64-bit lane; products are 64 bits wide, and what is above the lower half of a
// lane is never looked at.

FLUX_AVX2 void random_avx2(const RoundingKey& key, uint64_t first, int64_t blocks, uint16_t* out) {
  const __m256i m0 = _mm256_set1_epi64x(kMultiplier0), m1 = _mm256_set1_epi64x(kMultiplier1);
  const int64_t whole = blocks / 4 * 4;
  for (int64_t b = 0; b < whole; b += 4) {
    const auto counter = static_cast<int64_t>(first) + b;
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(counter), _mm256_set_epi64x(3, 2, 1, 0)),
            c1 = _mm256_set1_epi64x(counter >> 32), c2 = _mm256_set1_epi64x(key.high[0]),
            c3 = _mm256_set1_epi64x(key.high[1]);
    uint32_t k0 = key.key[0], k1 = key.key[1];
    for (int round = 0; round < 10; ++round, k0 += kWeyl0, k1 += kWeyl1) {
      const __m256i product0 = _mm256_mul_epu32(c0, m0), product1 = _mm256_mul_epu32(c2, m1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1),
                            _mm256_set1_epi64x(k0));
      c1 = product1;
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3),
                            _mm256_set1_epi64x(k1));
      c3 = product0;
    }
    const __m256i low = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA),
                  high = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA),
                  even = _mm256_unpacklo_epi64(low, high),  // blocks 0 and 2
        odd = _mm256_unpackhi_epi64(low, high);             // blocks 1 and 3
    auto* const to = reinterpret_cast<__m256i*>(out + 8 * b);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
  }
  random_plain(key, first + static_cast<uint64_t>(whole), blocks - whole, out + 8 * whole);
}

FLUX_AVX2 void decode_avx2(
    const uint8_t* codes, float absmax, const float* map, int64_t n, float* out) {
  const __m256 scale = _mm256_set1_ps(absmax);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i code =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_i32gather_ps(map, code, 4), scale));
  }
  decode_plain(codes + i, absmax, map, n - i, out + i);
}

FLUX_AVX2 void encode_avx2(
    const float* values, float absmax, const uint32_t* cells, int64_t n, uint8_t* codes) {
  const __m256 divisor = _mm256_set1_ps(absmax);
  const __m256i first = _mm256_set1_epi32(kFirstCell), last = _mm256_set1_epi32(kLastCell),
                half = _mm256_set1_epi32(0xFFFF), one = _mm256_set1_epi32(1);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i bits = _mm256_castps_si256(_mm256_div_ps(_mm256_loadu_ps(values + i), divisor)),
                  magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)),
                  negative = _mm256_srai_epi32(bits, 31);  // -1 or 0
    __m256i cell = _mm256_srli_epi32(magnitude, 16);
    cell = _mm256_min_epi32(_mm256_max_epi32(cell, first), last);
    cell = _mm256_add_epi32(_mm256_sub_epi32(cell, first),
                            _mm256_and_si256(negative, _mm256_set1_epi32(kNumCells)));
    const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int*>(cells), cell, 4),
                  beyond = _mm256_cmpgt_epi32(_mm256_and_si256(magnitude, half),
                                              _mm256_and_si256(entry, half)),
                  step = _mm256_and_si256(beyond, _mm256_or_si256(negative, one)),  // 1, -1 or 0
        code = _mm256_add_epi32(_mm256_srli_epi32(entry, 16), step);
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_packus_epi16(words, words));
  }
  encode_plain(values + i, absmax, cells, n - i, codes + i);
}

FLUX_AVX512 void random_avx512(const RoundingKey& key,
                               uint64_t first,
                               int64_t blocks,
                               uint16_t* out) {
  const __m512i m0 = _mm512_set1_epi64(kMultiplier0), m1 = _mm512_set1_epi64(kMultiplier1);
  const __m512i front = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0),
                back = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  const int64_t whole = blocks / 8 * 8;
  for (int64_t b = 0; b < whole; b += 8) {
    const auto counter = static_cast<int64_t>(first) + b;
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(counter),
                                  _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)),
            c1 = _mm512_set1_epi64(counter >> 32), c2 = _mm512_set1_epi64(key.high[0]),
            c3 = _mm512_set1_epi64(key.high[1]);
    uint32_t k0 = key.key[0], k1 = key.key[1];
    for (int round = 0; round < 10; ++round, k0 += kWeyl0, k1 += kWeyl1) {
      const __m512i product0 = _mm512_mul_epu32(c0, m0), product1 = _mm512_mul_epu32(c2, m1);
      c0 = _mm512_ternarylogic_epi64(
          _mm512_srli_epi64(product1, 32), c1, _mm512_set1_epi64(k0), 0x96);
      c1 = product1;
      c2 = _mm512_ternarylogic_epi64(
          _mm512_srli_epi64(product0, 32), c3, _mm512_set1_epi64(k1), 0x96);
      c3 = product0;
    }
    const __m512i low = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32)),
                  high = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
    _mm512_storeu_si512(out + 8 * b, _mm512_permutex2var_epi64(low, front, high));
    _mm512_storeu_si512(out + 8 * b + 32, _mm512_permutex2var_epi64(low, back, high));
  }
  random_plain(key, first + static_cast<uint64_t>(whole), blocks - whole, out + 8 * whole);
}

FLUX_AVX512 void decode_avx512(
    const uint8_t* codes, float absmax, const float* map, int64_t n, float* out) {
  const __m512 scale = _mm512_set1_ps(absmax);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i code =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_i32gather_ps(code, map, 4), scale));
  }
  decode_plain(codes + i, absmax, map, n - i, out + i);
}

FLUX_AVX512 void encode_avx512(
    const float* values, float absmax, const uint32_t* cells, int64_t n, uint8_t* codes) {
  const __m512 divisor = _mm512_set1_ps(absmax);
  const __m512i first = _mm512_set1_epi32(kFirstCell), last = _mm512_set1_epi32(kLastCell),
                half = _mm512_set1_epi32(0xFFFF), one = _mm512_set1_epi32(1);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i bits = _mm512_castps_si512(_mm512_div_ps(_mm512_loadu_ps(values + i), divisor)),
                  magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 negative = _mm512_movepi32_mask(bits);
    __m512i cell = _mm512_srli_epi32(magnitude, 16);
    cell = _mm512_sub_epi32(_mm512_min_epi32(_mm512_max_epi32(cell, first), last), first);
    cell = _mm512_mask_add_epi32(cell, negative, cell, _mm512_set1_epi32(kNumCells));
    const __m512i entry = _mm512_i32gather_epi32(cell, cells, 4);
    const __mmask16 beyond =
        _mm512_cmpgt_epi32_mask(_mm512_and_si512(magnitude, half), _mm512_and_si512(entry, half));
    __m512i code = _mm512_srli_epi32(entry, 16);
    code = _mm512_mask_add_epi32(code, static_cast<__mmask16>(beyond & ~negative), code, one);
    code = _mm512_mask_sub_epi32(code, static_cast<__mmask16>(beyond & negative), code, one);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(code));
  }
  encode_plain(values + i, absmax, cells, n - i, codes + i);
}

#endif

struct Found {
  TileFunctions all[3];
  int num;
};

const Found& found() {
  static const Found functions = [] {
    Found f{{{"plain", random_plain, decode_plain, encode_plain}}, 1};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2"))
      f.all[f.num++] = {"avx2", random_avx2, decode_avx2, encode_avx2};
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      f.all[f.num++] = {"avx512", random_avx512, decode_avx512, encode_avx512};
#endif
    return f;
  }();
  return functions;
}

}  // namespace

const TileFunctions& tile_functions() { return found().all[found().num - 1]; }
int num_tile_functions() { return found().num; }
const TileFunctions& tile_functions(int i) { return found().all[i]; }

}  // namespace flux
