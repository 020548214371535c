#include "common/core/ordered.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>

namespace flux {
namespace {

TEST(Ordered, GivesResultsInOrderAndRunsAheadOnlySoFar) {
  std::atomic<int64_t> started{0};
  int64_t taken = 0;
  Ordered<int64_t> ordered(200, 4, 10, [&](int64_t i) {
    ++started;
    std::this_thread::sleep_for(std::chrono::microseconds(i % 7 * 50));
    return i * i;
  });
  for (; taken < 200; ++taken) {
    EXPECT_EQ(ordered.take(), taken * taken);
    EXPECT_LE(started.load(), taken + 1 + 10);
  }
}

TEST(Ordered, ThrowsWhatTheWorkThrows) {
  Ordered<int> ordered(50, 3, 5, [](int64_t i) {
    if (i == 7) throw std::runtime_error("seven");
    return static_cast<int>(i);
  });
  EXPECT_THROW(
      {
        for (int i = 0; i < 50; ++i) (void)ordered.take();
      },
      std::runtime_error);
}

TEST(Ordered, StopsWhenItIsDroppedEarly) {
  std::atomic<int> started{0};
  {
    Ordered<int> ordered(1'000'000, 2, 4, [&](int64_t) { return ++started; });
    (void)ordered.take();
  }
  EXPECT_LE(started.load(), 5);
}

}  // namespace
}  // namespace flux
