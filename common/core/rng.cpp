#include "common/core/rng.h"

#include <bit>
#include <cmath>
#include <numeric>
#include <utility>

namespace flux {
namespace {

// Natural logarithm of a positive normal number, from additions, multiplications and divisions
// only: libm's differs between versions in the last bit. x = m 2^e with m in [sqrt(1/2), sqrt(2));
// log m = 2 artanh((m - 1) / (m + 1)) by its series, whose argument is below 0.1716, so that 12
// terms leave less than 1e-19.
double exact_order_log(double x) {
  const auto bits = std::bit_cast<uint64_t>(x);
  auto exponent = static_cast<int64_t>(bits >> 52) - 1023;
  double m = std::bit_cast<double>((bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++exponent;
  }
  const double s = (m - 1) / (m + 1);
  const double s2 = s * s;
  double sum = 0;
  for (int k = 23; k >= 1; k -= 2) sum = sum * s2 + 1.0 / k;
  return 2 * s * sum + static_cast<double>(exponent) * 0.6931471805599453;
}

}  // namespace

// AS 241, PPND16: relative accuracy about 1e-16.
double normal_quantile(double p) {
  const double q = p - 0.5;
  if (std::abs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q *
           (((((((r * 2509.0809287301226727 + 33430.575583588128105) * r + 67265.770927008700853) *
                    r +
                45921.953931549871457) *
                   r +
               13731.693765509461125) *
                  r +
              1971.5909503065514427) *
                 r +
             133.14166789178437745) *
                r +
            3.387132872796366608) /
           (((((((r * 5226.495278852545925 + 28729.085735721942674) * r + 39307.89580009271061) *
                    r +
                21213.794301586595867) *
                   r +
               5394.1960214247511077) *
                  r +
              687.1870074920579083) *
                 r +
             42.313330701600911252) *
                r +
            1.0);
  }
  double r = std::sqrt(-exact_order_log(q < 0 ? p : 1 - p));  // sqrt is exactly rounded everywhere
  double value;
  if (r <= 5) {
    r -= 1.6;
    value = (((((((r * 7.7454501427834140764e-4 + 0.0227238449892691845833) * r +
                  0.24178072517745061177) *
                     r +
                 1.27045825245236838258) *
                    r +
                3.64784832476320460504) *
                   r +
               5.7694972214606914055) *
                  r +
              4.6303378461565452959) *
                 r +
             1.42343711074968357734) /
            (((((((r * 1.05075007164441684324e-9 + 5.475938084995344946e-4) * r +
                  0.0151986665636164571966) *
                     r +
                 0.14810397642748007459) *
                    r +
                0.68976733498510000455) *
                   r +
               1.6763848301838038494) *
                  r +
              2.05319162663775882187) *
                 r +
             1.0);
  } else {
    r -= 5;
    value = (((((((r * 2.01033439929228813265e-7 + 2.71155556874348757815e-5) * r +
                  0.0012426609473880784386) *
                     r +
                 0.026532189526576123093) *
                    r +
                0.29656057182850489123) *
                   r +
               1.7848265399172913358) *
                  r +
              5.4637849111641143699) *
                 r +
             6.6579046435011037772) /
            (((((((r * 2.04426310338993978564e-15 + 1.4215117583164458887e-7) * r +
                  1.8463183175100546818e-5) *
                     r +
                 7.868691311456132591e-4) *
                    r +
                0.0148753612908506148525) *
                   r +
               0.13692988092273580531) *
                  r +
              0.59983220655588793769) *
                 r +
             1.0);
  }
  return q < 0 ? -value : value;
}

namespace {

// SplitMix64's finaliser: spreads any difference in (seed, purpose, a, b) over the whole key.
uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

}  // namespace

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(product0)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

RandomStream::RandomStream(uint64_t seed, Purpose purpose, uint64_t a, uint64_t b) {
  const uint64_t key = mix(mix(seed) ^ static_cast<uint64_t>(purpose));
  const uint64_t high = mix(mix(a) ^ (b * 0x9E3779B97F4A7C15ull + 0x632BE59BD9B4E019ull));
  key_ = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  high_ = {static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)};
}

uint32_t RandomStream::bits(uint64_t i) const {
  const uint64_t block = i / 4;
  return philox4x32(
      {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), high_[0], high_[1]},
      key_)[i % 4];
}

uint64_t RandomStream::bits64(uint64_t i) const {
  const uint64_t block = i / 2;
  const auto words = philox4x32(
      {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), high_[0], high_[1]}, key_);
  const size_t at = i % 2 * 2;
  return uint64_t{words[at]} | uint64_t{words[at + 1]} << 32;
}

double RandomStream::uniform(uint64_t i) const {
  return static_cast<double>(bits64(i) >> 11) * 0x1.0p-53;
}

uint64_t RandomStream::below(uint64_t i, uint64_t n) const {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((Wide{bits64(i)} * n) >> 64);
}

double RandomStream::normal(uint64_t i) const {
  // the middle of the 53-bit cell, so that 0 and 1 cannot come up
  return normal_quantile((static_cast<double>(bits64(i) >> 12) + 0.5) * 0x1.0p-52);
}

void RandomStream::fill_normal(std::span<float> out) const {
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(normal(i));
}

std::vector<uint64_t> RandomStream::permutation(uint64_t n) const {
  std::vector<uint64_t> order(n);
  std::iota(order.begin(), order.end(), uint64_t{0});
  for (uint64_t i = 0; i + 1 < n; ++i) std::swap(order[i], order[i + below(i, n - i)]);
  return order;
}

}  // namespace flux
