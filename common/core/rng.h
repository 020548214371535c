// common/core/rng.h - counter-based random numbers: the same bits on any machine, in any order of
// asking.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace flux {

/// Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.
/// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", with the constants of
/// Random123.
std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

/// The standard normal value that a share `p` in (0, 1) of all lies below, with no call into libm; see
/// RandomStream::normal().
double normal_quantile(double p);

/// What a stream of random numbers is for; streams of different purposes never meet. Values are
/// part of what a seed means: never renumber.
enum class Purpose : uint32_t {
  kShuffle = 1,
  kTimestep = 2,
  kNoise = 3,
  kPosterior = 4,
  kFlip = 5,
  kCaptionVariant = 6,
  kCaptionDropout = 7,
  kLoraInit = 8,
  kStochasticRounding = 9,
  kTinyModel = 10,
  kDemo = 11,
  kCaptionProgram = 12,
  kLatentSample = 13,
  kTimestepStratum = 14,
  kInputNoise = 15,
  kAdapterDropout = 16,
  kSampling = 17,
};

/// One stream of numbers, fixed by (seed, purpose, a, b): `a` is an epoch or step, `b` an item, for
/// example. Element i of a stream does not depend on how many are drawn, or on what was drawn
/// before.
class RandomStream {
 public:
  RandomStream(uint64_t seed, Purpose purpose, uint64_t a = 0, uint64_t b = 0);

  /// Element `i` as 32 random bits.
  uint32_t bits(uint64_t i) const;
  /// Element `i`, uniform in [0, 1) with 53 random bits.
  double uniform(uint64_t i) const;
  /// Element `i`, uniform in [0, n); n > 0. Exactly uniform up to a bias below n / 2^64.
  uint64_t below(uint64_t i, uint64_t n) const;
  /// Element `i`, standard normal: the inverse of the normal distribution at a 53-bit uniform, in
  /// double, with no call into libm, so that all machines agree to the last bit. Source: Wichura
  /// 1988, algorithm AS 241 (PPND16), with our own logarithm.
  double normal(uint64_t i) const;
  /// Elements 0 .. out.size()-1 as float.
  void fill_normal(std::span<float> out) const;
  /// A random order of 0 .. n-1 (Fisher-Yates on elements 0 .. n-2).
  std::vector<uint64_t> permutation(uint64_t n) const;

 private:
  uint64_t bits64(uint64_t i) const;
  std::array<uint32_t, 2> key_;
  std::array<uint32_t, 2> high_;  // upper half of the counter
};

}  // namespace flux
