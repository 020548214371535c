#include "common/core/ordered.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <stdexcept>

#include "common/core/sanitizer.h"

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

TEST(Ordered, GivesWhatCameBeforeAFailureFirst) {
  std::atomic<bool> failed{false};
  Ordered<int> ordered(10, 2, 10, [&](int64_t i) {
    if (i == 1) {
      failed = true;
      throw std::runtime_error("one");
    }
    while (i == 0 && !failed) std::this_thread::yield();  // item 0 is ready after item 1 has failed
    return static_cast<int>(i);
  });
  EXPECT_EQ(ordered.take(), 0);
  EXPECT_THROW((void)ordered.take(), std::runtime_error);
  EXPECT_THROW((void)ordered.take(), std::runtime_error);
}

TEST(Ordered, KeepsToItsBudgetOfBytes) {
  std::atomic<int64_t> working{0}, started{0};
  MemoryBudget budget{
      100, [](int64_t i) { return i == 5 ? 1000 : 40; }, [](int64_t) { return 20; }};
  Ordered<int64_t> ordered(
      40,
      8,
      40,
      [&](int64_t i) {
        ++started;
        EXPECT_LE(working += i == 5 ? 1000 : 40, i == 5 ? 1000 : 80);  // the large one works alone
        std::this_thread::yield();
        working -= i == 5 ? 1000 : 40;
        return i;
      },
      budget);
  for (int64_t i = 0; i < 40; ++i) {
    EXPECT_LE(started.load(), i + 5);  // five results fill it
    EXPECT_EQ(ordered.take(), i);
  }
}

#if !FLUX_ADDRESS_SANITIZER
[[noreturn]] void start_without_room() {
  const rlimit none{1 << 20, RLIM_INFINITY};  // for a thread's stack
  setrlimit(RLIMIT_AS, &none);
  try {
    Ordered<int> ordered(3, 4, 3, [](int64_t) { return 1; });
  } catch (const ResourceError&) {
    std::_Exit(7);
  }
  std::_Exit(1);
}

TEST(OrderedDeathTest, IsAnErrorWhereNoThreadCanBeStarted) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";  // a process without stacks to use again
  EXPECT_EXIT(start_without_room(), testing::ExitedWithCode(7), "");
}
#endif

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
