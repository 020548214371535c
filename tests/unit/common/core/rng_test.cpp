#include "common/core/rng.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>

namespace flux {
namespace {

TEST(Philox, MatchesRandom123) {  // golden: kat_vectors of Random123, philox4x32 10
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(RandomStream, DoesNotDependOnHowManyAreDrawn) {
  const RandomStream stream(7, Purpose::kNoise, 3, 5);
  std::vector<float> few(5), many(1000);
  stream.fill_normal(few);
  stream.fill_normal(many);
  EXPECT_TRUE(std::equal(few.begin(), few.end(), many.begin()));
}

TEST(RandomStream, DiffersInEveryPartOfItsName) {
  const uint32_t base = RandomStream(1, Purpose::kNoise, 2, 3).bits(0);
  EXPECT_NE(base, RandomStream(2, Purpose::kNoise, 2, 3).bits(0));
  EXPECT_NE(base, RandomStream(1, Purpose::kTimestep, 2, 3).bits(0));
  EXPECT_NE(base, RandomStream(1, Purpose::kNoise, 3, 3).bits(0));
  EXPECT_NE(base, RandomStream(1, Purpose::kNoise, 2, 4).bits(0));
  EXPECT_NE(base, RandomStream(1, Purpose::kNoise, 3, 2).bits(0));
}

TEST(RandomStream, NormalsHaveTheRightMoments) {
  const RandomStream stream(1, Purpose::kNoise);
  constexpr int64_t kCount = 200000;
  double sum = 0, sum2 = 0, sum4 = 0;
  for (int64_t i = 0; i < kCount; ++i) {
    const double x = stream.normal(static_cast<uint64_t>(i));
    sum += x;
    sum2 += x * x;
    sum4 += x * x * x * x;
  }
  EXPECT_NEAR(sum / kCount, 0, 0.01);
  EXPECT_NEAR(sum2 / kCount, 1, 0.015);
  EXPECT_NEAR(sum4 / kCount, 3, 0.1);
}

TEST(RandomStream, NormalsAreTheInverseOfTheNormalDistribution) {
  const RandomStream stream(3, Purpose::kNoise);
  double largest = 0;
  for (uint64_t i = 0; i < 20000; ++i) {
    const double x = stream.normal(i);
    const double u = stream.uniform(i);  // the same 52 leading bits
    largest = std::max(largest, std::abs(0.5 * std::erfc(-x / std::sqrt(2.0)) - u));
  }
  EXPECT_LT(largest, 5e-16 + 0x1.0p-51);
}

TEST(RandomStream, GivesTheseBitsOnEveryMachine) {  // golden: of this implementation, kept
  const RandomStream stream(42, Purpose::kLoraInit, 1, 2);
  uint64_t hash = 0xcbf29ce484222325ull;
  for (uint64_t i = 0; i < 10000; ++i) {
    hash = (hash ^ std::bit_cast<uint64_t>(stream.normal(i))) * 0x100000001b3ull;
  }
  EXPECT_EQ(hash, 0x57453e8d7fa6fb23ull);
}

TEST(RandomStream, PermutationHoldsEachOnce) {
  auto order = RandomStream(1, Purpose::kShuffle, 4).permutation(100);
  EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
  std::sort(order.begin(), order.end());
  for (uint64_t i = 0; i < 100; ++i) EXPECT_EQ(order[i], i);
}

}  // namespace
}  // namespace flux
