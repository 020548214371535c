#include "common/engine/ring_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <random>
#include <set>

#include "common/engine/record_layout.h"

namespace flux::engine {
namespace {

int64_t rounded(int64_t bytes) {
  return (bytes + kRecordAlignment - 1) / kRecordAlignment * kRecordAlignment;
}

int64_t largest_window(const std::vector<int64_t>& bytes,
                       const std::vector<int64_t>& cycle,
                       int64_t lookahead) {
  int64_t least = 0;
  for (size_t i = 0; i < cycle.size(); ++i) {
    std::set<int64_t> window;
    for (int64_t k = 0; k <= lookahead; ++k)
      window.insert(cycle[(i + static_cast<size_t>(k)) % cycle.size()]);
    int64_t sum = 0;
    for (const int64_t record : window) sum += rounded(bytes[static_cast<size_t>(record)]);
    least = std::max(least, sum);
  }
  return least;
}

/// Runs a plan for several turns, with the arena as a map of which record each byte range holds.
void expect_sound(const RingPlan& plan,
                  const std::vector<int64_t>& bytes,
                  const std::vector<int64_t>& cycle,
                  int64_t lookahead) {
  struct There {
    int64_t offset, end, last;
    bool promised;
  };
  std::map<int64_t, There> there;
  const auto turns = static_cast<int64_t>(2 * plan.placements.size() + 3 * cycle.size());
  for (int64_t t = 0; t < turns; ++t) {
    const Placement& p = plan.at(t);
    SCOPED_TRACE(testing::Message() << "position " << t);
    ASSERT_EQ(p.record, cycle[static_cast<size_t>(t) % cycle.size()]);
    const int64_t size = rounded(bytes[static_cast<size_t>(p.record)]);
    ASSERT_GE(p.offset, 0);
    ASSERT_LE(p.offset + size, plan.capacity);
    ASSERT_EQ(p.offset % kRecordAlignment, 0);
    if (!p.load) {
      ASSERT_TRUE(there.contains(p.record));
      ASSERT_EQ(there.at(p.record).offset, p.offset);
      ASSERT_TRUE(there.at(p.record).promised);
    } else {
      if (there.contains(p.record)) {
        ASSERT_FALSE(there.at(p.record).promised);
      }
      for (auto it = there.begin(); it != there.end();) {
        const bool hit = it->second.offset < p.offset + size && p.offset < it->second.end;
        if (hit) {
          ASSERT_LT(it->second.last, t - lookahead) << "overwrites record " << it->first;
          ASSERT_FALSE(it->second.promised);
        }
        it = hit ? there.erase(it) : std::next(it);
      }
    }
    there[p.record] = {p.offset, p.offset + size, t, p.kept};
  }
}

TEST(RingPlan, EqualSlotsAreSound) {
  std::mt19937_64 random(9);
  for (const size_t num_records : {2, 3, 5, 8, 40}) {
    std::vector<int64_t> bytes(num_records), distinct(num_records);
    for (auto& b : bytes) b = static_cast<int64_t>(1 + random() % (1 << 20));
    std::iota(distinct.begin(), distinct.end(), 0);
    for (const auto& cycle : {distinct, forward_and_back(distinct)}) {
      for (const int64_t lookahead : {1, 2}) {
        for (const int64_t slots : {0, 0, 1, 2}) {  // more than there must be
          const int64_t room = rounded(std::ranges::max(bytes)) * (lookahead + 1 + slots);
          const auto plan = plan_ring(bytes, cycle, lookahead, slots ? room : 0, RingSlots::kEqual);
          expect_sound(plan, bytes, cycle, lookahead);
        }
      }
    }
  }
}

/// The simulation of as many took seconds.
TEST(RingPlan, ThousandsOfRecordsTakeEqualSlotsInTurn) {
  std::vector<int64_t> bytes(5000, 100), cycle(bytes.size());
  bytes[17] = 5000;
  std::iota(cycle.begin(), cycle.end(), 0);
  const auto plan = plan_ring(bytes, cycle, 2, 0, RingSlots::kEqual);
  expect_sound(plan, bytes, cycle, 2);
  EXPECT_EQ(plan.placements.size(), 15000u);
  EXPECT_EQ(plan.placements[4].offset, rounded(5000));
}

TEST(RingPlan, IsSoundForRandomSizesAndCycles) {
  std::mt19937_64 random(7);
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  int64_t at_least = 0, cases = 0;
  for (int seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(testing::Message() << "case " << seed);
    const int64_t num_records = pick(1, 12), lookahead = pick(1, 3);
    std::vector<int64_t> bytes, cycle;
    for (int64_t i = 0; i < num_records; ++i) bytes.push_back(pick(1, 40) * 1000);
    if (seed % 3 == 0) {
      std::vector<int64_t> all(static_cast<size_t>(num_records));
      std::iota(all.begin(), all.end(), 0);
      cycle = forward_and_back(all);
    } else {
      for (int64_t i = pick(1, 20); i > 0; --i) cycle.push_back(pick(0, num_records - 1));
    }
    const auto plan = plan_ring(bytes, cycle, lookahead);
    expect_sound(plan, bytes, cycle, lookahead);
    const int64_t least = largest_window(bytes, cycle, lookahead);
    EXPECT_GE(plan.capacity, least);
    int64_t largest = 0;
    for (const int64_t record : cycle)
      largest = std::max(largest, rounded(bytes[static_cast<size_t>(record)]));
    EXPECT_LE(plan.capacity, std::max(least, largest * (lookahead + 1)));
    at_least += plan.capacity == least;
    ++cases;
    // more memory never loads more than all of it
    const auto roomy = plan_ring(bytes, cycle, lookahead, plan.capacity + pick(0, 100) * 4096);
    expect_sound(roomy, bytes, cycle, lookahead);
  }
  // the smallest conceivable capacity is found where it is not a puzzle
  EXPECT_GE(at_least, cases * 8 / 10);
}

/// FLUX.1-dev in bf16, rounded: 19 double blocks, 38 single ones.
struct Dev {
  Dev() {
    for (int i = 0; i < 57; ++i) {
      bytes.push_back(i < 19 ? int64_t{679'665'664} : int64_t{283'185'152});
      all.push_back(i);
    }
  }
  std::vector<int64_t> bytes, all;
};

TEST(RingPlan, TakesTheLeastMemoryForFlux) {
  const Dev dev;
  for (const int64_t lookahead : {1, 2, 3}) {
    SCOPED_TRACE(lookahead);
    const auto cycle = forward_and_back(dev.all);
    const auto plan = plan_ring(dev.bytes, cycle, lookahead);
    expect_sound(plan, dev.bytes, cycle, lookahead);
    EXPECT_EQ(plan.capacity, rounded(dev.bytes[0]) * (lookahead + 1));
    // at each end the records of as many positions as there are slots are not loaded again
    int64_t total = 0;
    for (const int64_t record : cycle) total += dev.bytes[static_cast<size_t>(record)];
    EXPECT_LE(plan.bytes_per_cycle(dev.bytes, cycle.size()),
              total - (lookahead + 1) * (dev.bytes[0] + dev.bytes[56]));
  }
}

TEST(RingPlan, KeepsAsManyAsThereAreSlotsAtEachTurn) {
  const std::vector<int64_t> bytes(10, 8192), all{0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  const auto cycle = forward_and_back(all);
  for (const int64_t lookahead : {1, 2, 3}) {
    const auto plan = plan_ring(bytes, cycle, lookahead);
    EXPECT_EQ(plan.capacity, (lookahead + 1) * 8192);
    EXPECT_EQ(plan.bytes_per_cycle(bytes, cycle.size()), (20 - 2 * (lookahead + 1)) * 8192);
  }
}

TEST(RingPlan, AnOddCycleNeedsNoMoreMemory) {
  const std::vector<int64_t> bytes(5, 4096), cycle{0, 1, 2, 3, 4};
  const auto plan = plan_ring(bytes, cycle, 1);
  EXPECT_EQ(plan.capacity, 2 * 4096);
  expect_sound(plan, bytes, cycle, 1);
}

TEST(RingPlan, LoadsOnceWhatFits) {
  const std::vector<int64_t> bytes{4096, 12288, 8192}, cycle{0, 1, 2, 2, 1, 0};
  const auto plan = plan_ring(bytes, cycle, 1, 6 * 4096);
  EXPECT_EQ(plan.bytes_per_cycle(bytes, cycle.size()), 0);
  expect_sound(plan, bytes, cycle, 1);
}

TEST(RingPlan, MoreMemoryLoadsLess) {
  const Dev dev;
  const auto cycle = forward_and_back(dev.all);
  for (const int64_t lookahead : {1, 2}) {
    int64_t total = 0;
    for (const int64_t record : cycle) total += dev.bytes[static_cast<size_t>(record)];
    for (const int64_t gigabytes : {3, 6, 8, 10, 14}) {
      SCOPED_TRACE(testing::Message() << gigabytes << " GB, lookahead " << lookahead);
      const int64_t room = gigabytes * 1'000'000'000;
      const auto plan = plan_ring(dev.bytes, cycle, lookahead, room);
      expect_sound(plan, dev.bytes, cycle, lookahead);
      // each end could keep as much as fits
      EXPECT_LE(plan.bytes_per_cycle(dev.bytes, cycle.size()), total - 2 * room * 6 / 10);
    }
  }
}

TEST(RingPlan, RefusesWrongNumbers) {
  const std::vector<int64_t> bytes{4096, 4096, 4096}, cycle{0, 1, 2};
  const std::vector<int64_t> none, beyond{0, 3}, negative{-1};
  EXPECT_THROW(plan_ring(bytes, none, 1), std::invalid_argument);
  EXPECT_THROW(plan_ring(bytes, beyond, 1), std::invalid_argument);
  EXPECT_THROW(plan_ring(bytes, negative, 1), std::invalid_argument);
  EXPECT_THROW(plan_ring(bytes, cycle, 0), std::invalid_argument);
  EXPECT_THROW(plan_ring(bytes, cycle, 1, 4096), std::invalid_argument);
}

}  // namespace
}  // namespace flux::engine
