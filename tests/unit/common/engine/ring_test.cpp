#include "common/engine/ring.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <random>
#include <thread>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/engine/file_arena.h"
#include "tests/support/temporary_folder.h"

namespace flux::engine {
namespace {

using testing::HasSubstr;

const at::Device kCpu(at::kCPU);

/// Records in memory that take their time, fail when told to, and notice a record that is read and
/// written at the same time.
class SlowStore final : public RecordStore {
 public:
  explicit SlowStore(std::vector<int64_t> bytes, bool writable = true)
      : records_(std::move(bytes)),
        busy_(static_cast<size_t>(records_.num_records())),
        writable_(writable) {}

  int64_t num_records() const override { return records_.num_records(); }
  int64_t record_bytes(int64_t index) const override { return records_.record_bytes(index); }
  bool writable() const override { return writable_; }
  void read(int64_t index, int64_t offset, std::span<std::byte> to) const override {
    nap();
    if (fail_reads-- == 0) throw InputError("record " + std::to_string(index) + " cannot be read");
    if (busy_[static_cast<size_t>(index)] > 0) collided = true;
    records_.read(index, offset, to);
  }
  using RecordStore::read;
  using RecordStore::write;
  void write(int64_t index, int64_t offset, std::span<const std::byte> from) override {
    ++busy_[static_cast<size_t>(index)];
    nap();
    if (fail_writes-- == 0)
      throw ResourceError("record " + std::to_string(index) + " cannot be written");
    records_.write(index, offset, from);
    --busy_[static_cast<size_t>(index)];
  }
  std::vector<std::pair<int64_t, int64_t>> parts(int64_t index, int64_t) const override {
    return RecordStore::parts(index, part_bytes);
  }
  std::span<std::byte> record(int64_t index) const { return records_.record(index); }

  mutable std::atomic<int64_t> fail_reads = -1, fail_writes = -1;  // after so many; -1: never
  mutable std::atomic<bool> collided = false;
  int64_t part_bytes = 8192;
  int max_nap_us = 0;

 private:
  void nap() const {
    if (max_nap_us == 0) return;
    thread_local std::mt19937 random(std::random_device{}());
    std::this_thread::sleep_for(
        std::chrono::microseconds(std::uniform_int_distribution<int>(0, max_nap_us)(random)));
  }
  MemoryStore records_;
  std::vector<std::atomic<int>> busy_;
  bool writable_;
};

void fill(std::span<std::byte> bytes, uint64_t stamp) {
  for (size_t i = 0; i + 8 <= bytes.size(); i += 8) {
    const uint64_t value = stamp * 1'000'003 + i;
    std::memcpy(bytes.data() + i, &value, 8);
  }
}
bool holds(std::span<const std::byte> bytes, uint64_t stamp) {
  for (size_t i = 0; i + 8 <= bytes.size(); i += 8) {
    uint64_t value = 0;
    std::memcpy(&value, bytes.data() + i, 8);
    if (value != stamp * 1'000'003 + i) return false;
  }
  return true;
}
std::span<std::byte> bytes_of(const at::Tensor& record) {
  return {static_cast<std::byte*>(record.data_ptr()), static_cast<size_t>(record.size(0))};
}

std::vector<int64_t> iota(int64_t count) {
  std::vector<int64_t> all;
  for (int64_t i = 0; i < count; ++i) all.push_back(i);
  return all;
}

/// A store of `sizes`, record i filled with stamp i + 1.
std::shared_ptr<SlowStore> make_store(std::vector<int64_t> sizes, bool writable = true) {
  auto store = std::make_shared<SlowStore>(std::move(sizes), writable);
  for (int64_t i = 0; i < store->num_records(); ++i)
    fill(store->record(i), static_cast<uint64_t>(i + 1));
  return store;
}

TEST(Ring, HandsOutWhatWasWrittenLastInAnySchedule) {
  std::mt19937_64 random(11);
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const int64_t num_records = pick(1, 9), lookahead = pick(1, 3);
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < num_records; ++i) sizes.push_back(pick(1, 300) * 64);
    const auto store = make_store(sizes);
    store->max_nap_us = round % 2 == 0 ? 0 : 300;
    std::vector<uint64_t> expected;
    for (int64_t i = 0; i < num_records; ++i) expected.push_back(static_cast<uint64_t>(i + 1));
    const auto random_cycle = [&] {
      if (pick(0, 1) == 0) return forward_and_back(iota(num_records));
      std::vector<int64_t> cycle;
      for (int64_t i = pick(1, 15); i > 0; --i) cycle.push_back(pick(0, num_records - 1));
      return cycle;
    };
    auto cycle = forward_and_back(iota(num_records));
    Ring ring(
        store, kCpu, cycle, {.lookahead = lookahead, .read_threads = static_cast<int>(pick(1, 3))});
    uint64_t stamp = 1000;
    for (int schedule = 0; schedule < 3; ++schedule) {
      std::deque<Lease> held;
      const int64_t positions = pick(1, 60);
      for (int64_t p = 0; p < positions; ++p) {
        auto lease = ring.acquire();
        ASSERT_EQ(lease.position, p);
        ASSERT_EQ(lease.index, cycle[static_cast<size_t>(p) % cycle.size()]);
        const auto index = static_cast<size_t>(lease.index);
        ASSERT_EQ(lease.record.size(0), sizes[index]);
        ASSERT_TRUE(holds(bytes_of(lease.record), expected[index]))
            << "record " << index << " at position " << p;
        held.push_back(std::move(lease));
        while (!held.empty() && (std::ssize(held) > lookahead || pick(0, 2) == 0)) {
          const bool dirty = pick(0, 2) == 0;
          auto& oldest = held.front();
          if (dirty) {
            // another lease of the same record sees the change
            fill(bytes_of(oldest.record), ++stamp);
            expected[static_cast<size_t>(oldest.index)] = stamp;
          }
          ring.release(std::move(oldest), dirty);
          held.pop_front();
        }
      }
      for (auto& lease : held) ring.release(std::move(lease), false);
      ring.flush();
      for (int64_t i = 0; i < num_records; ++i)
        ASSERT_TRUE(holds(store->record(i), expected[static_cast<size_t>(i)])) << "record " << i;
      const int64_t room = ring.capacity_bytes();
      do {
        cycle = random_cycle();
        try {
          plan_ring(sizes, cycle, lookahead, room);
          break;
        } catch (const std::invalid_argument&) {
        }
      } while (true);
      ring.set_schedule(cycle);
      EXPECT_EQ(ring.capacity_bytes() / 4096, room / 4096);
    }
    EXPECT_FALSE(store->collided);
  }
}

TEST(Ring, CountsTheLoadsThatTurningAroundSaves) {
  const auto store = make_store(std::vector<int64_t>(10, 8192), false);
  Ring ring(store, kCpu, forward_and_back(iota(10)), {.lookahead = 1});
  EXPECT_EQ(ring.capacity_bytes(), 2 * 8192);
  const auto step = [&] {
    for (int i = 0; i < 20; ++i) ring.release(ring.acquire(), false);
  };
  for (int i = 0; i < 4; ++i) step();
  // the first 10, then each turn but two of 20 minus two, and what is read ahead
  const auto before = ring.counts();
  EXPECT_NEAR(static_cast<double>(before.loads), 18 + 3 * 16, 2);
  step();
  EXPECT_EQ(ring.counts().loads - before.loads, 16);
  EXPECT_EQ(ring.counts().bytes_read, ring.counts().loads * 8192);
  EXPECT_EQ(ring.counts().write_backs, 0);
}

TEST(Ring, WritesADirtyRecordOncePerEviction) {
  const auto store = make_store(std::vector<int64_t>(6, 4096));
  Ring ring(store, kCpu, forward_and_back(iota(6)), {.lookahead = 1});
  for (int i = 0; i < 12; ++i) ring.release(ring.acquire(), i >= 6);
  ring.flush();
  const auto counts = ring.counts();
  EXPECT_EQ(counts.write_backs, 6);
  EXPECT_EQ(counts.bytes_written, 6 * 4096);
  ring.flush();
  EXPECT_EQ(ring.counts().write_backs, 6);
}

TEST(Ring, RethrowsAFailedRead) {
  for (const int64_t after : {0, 5, 40}) {
    const auto store = make_store(std::vector<int64_t>(5, 4 * 8192));
    store->fail_reads = after;
    Ring ring(store, kCpu, forward_and_back(iota(5)), {.lookahead = 2, .read_threads = 2});
    const auto run = [&] {
      for (int i = 0; i < 100; ++i) ring.release(ring.acquire(), false);
    };
    EXPECT_THROW(run(), InputError);
    EXPECT_THROW(ring.acquire(), InputError);  // and stays so
    EXPECT_THROW(ring.flush(), InputError);
  }
}

TEST(Ring, RethrowsAFailedWrite) {
  const auto store = make_store(std::vector<int64_t>(5, 4 * 8192));
  store->fail_writes = 2;
  Ring ring(store, kCpu, forward_and_back(iota(5)), {.lookahead = 1});
  const auto run = [&] {
    for (int i = 0; i < 100; ++i) ring.release(ring.acquire(), true);
  };
  EXPECT_THROW(run(), ResourceError);
  EXPECT_THROW(ring.flush(), ResourceError);
}

TEST(Ring, FlushRethrowsAFailedWrite) {
  const auto store = make_store({4096});
  store->fail_writes = 0;
  Ring ring(store, kCpu, {0}, {});
  ring.release(ring.acquire(), true);
  EXPECT_THROW(ring.flush(), ResourceError);
}

TEST(Ring, EndsAtAnyMoment) {
  std::mt19937 random(3);
  for (int round = 0; round < 100; ++round) {
    const auto store = make_store(std::vector<int64_t>(6, 3 * 8192));
    store->max_nap_us = 200;
    std::optional<Lease> held;
    {
      Ring ring(
          store, kCpu, forward_and_back(iota(6)), {.lookahead = 1 + round % 3, .read_threads = 2});
      const int positions = std::uniform_int_distribution<int>(0, 20)(random);
      for (int i = 0; i < positions; ++i) ring.release(ring.acquire(), i % 2 == 0);
      held = ring.acquire();
    }
    // a record that is held outlives its ring
    EXPECT_EQ(bytes_of(held->record).size(), 3u * 8192);
    EXPECT_NE(held->record.sum(at::kLong).item<int64_t>(), 0);
  }
}

TEST(Ring, SaysThatMoreIsHeldThanFits) {
  const auto store = make_store(std::vector<int64_t>(6, 4096));
  Ring ring(store, kCpu, iota(6), {.lookahead = 1});
  const auto first = ring.acquire(), second = ring.acquire();
  EXPECT_THROW(ring.acquire(), std::logic_error);
  EXPECT_THROW(ring.flush(), std::logic_error);
  ring.release(first, false);
  EXPECT_EQ(ring.acquire().index, 2);
  EXPECT_THROW(ring.release(first, false), std::logic_error);
}

TEST(Ring, RefusesChangesToAStoreThatIsReadOnly) {
  const auto store = make_store({4096, 4096}, false);
  Ring ring(store, kCpu, iota(2), {});
  EXPECT_THROW(ring.release(ring.acquire(), true), std::logic_error);
}

TEST(Ring, StopsWaitingAfterASignalIfAsked) {
  const auto store = make_store(std::vector<int64_t>(6, 8192), false);
  store->max_nap_us = 2'000'000;
  cancel::set(ExitCode::kInterrupt);
  {
    Ring ring(store, kCpu, iota(6), {.interruptible = true});
    EXPECT_THROW(
        {
          for (int i = 0; i < 6; ++i) ring.release(ring.acquire(), false);
        },
        Interrupted);
  }
  store->max_nap_us = 1000;
  Ring ring(store, kCpu, iota(6), {});
  EXPECT_NO_THROW(ring.release(ring.acquire(), false));
  cancel::set(std::nullopt);
}

TEST(Ring, ReadsAheadWhileTheConsumerWorks) {
  const auto store = make_store(std::vector<int64_t>(4, 8192), false);
  store->max_nap_us = 1;
  Ring ring(store, kCpu, iota(4), {.lookahead = 1});
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const auto before = ring.counts().waited_seconds;
  ring.release(ring.acquire(), false);
  EXPECT_LT(ring.counts().waited_seconds - before, 0.02);
  EXPECT_GE(ring.counts().loads, 2);
}

TEST(Ring, OnMetaIsTheSameMemoryAndNothingElse) {
  count_tensor_memory();
  const std::vector<int64_t> sizes{12288, 4096, 4096, 8192};
  const auto planned = std::make_shared<PlannedStore>(sizes, true);
  const auto cycle = forward_and_back(iota(4));
  const RingOptions options{.lookahead = 2};
  reset_meta_peak();
  const int64_t before = meta_memory().live;
  Ring meta(planned, at::Device(at::kMeta), cycle, options);
  const auto ring_bytes = [](const MemoryUse& use) {
    return use.causes[static_cast<size_t>(MemoryCause::kRing)];
  };
  EXPECT_EQ(meta_memory().live - before, meta.capacity_bytes());
  EXPECT_EQ(ring_bytes(meta_memory()), meta.capacity_bytes());
  for (int i = 0; i < 30; ++i) {
    auto lease = meta.acquire();
    EXPECT_TRUE(lease.record.is_meta());
    EXPECT_EQ(lease.record.size(0), sizes[static_cast<size_t>(lease.index)]);
    meta.release(std::move(lease), true);
  }
  meta.flush();
  reset_cpu_peak();
  const int64_t live = cpu_memory().live;
  const auto store = make_store(sizes);
  const int64_t with_store = cpu_memory().live;
  Ring cpu(store, kCpu, cycle, options);
  EXPECT_EQ(with_store - live, 12288 + 4096 + 4096 + 8192);
  EXPECT_EQ(cpu_memory().live - with_store, meta.capacity_bytes());
  EXPECT_EQ(ring_bytes(cpu_memory()), meta.capacity_bytes());
  EXPECT_EQ(cpu.capacity_bytes(), meta.capacity_bytes());
  // page-aligned, so that reads past the page cache need no buffer
  EXPECT_EQ(reinterpret_cast<uintptr_t>(cpu.acquire().record.data_ptr()) % 4096, 0u);
}

TEST(Ring, StreamsAScratchFile) {
  const test::TemporaryFolder folder;
  for (const FileAccess access : {FileAccess::kCached, FileAccess::kDropped, FileAccess::kDirect}) {
    const std::vector<int64_t> sizes{12288, 4096, 20480, 8192, 4096};
    const auto store = std::make_shared<FileArena>(folder.path(), sizes, access);
    Ring ring(store, kCpu, forward_and_back(iota(5)), {.lookahead = 1, .read_threads = 2});
    for (uint64_t turn = 0; turn < 4; ++turn)
      for (uint64_t p = 0; p < 10; ++p) {
        auto lease = ring.acquire();
        const auto index = static_cast<uint64_t>(lease.index);
        const bool backward = p >= 5;
        if (turn > 0 || backward) {
          ASSERT_TRUE(holds(bytes_of(lease.record),
                            backward ? 100 * turn + index : 100 * (turn - 1) + 50 + index));
        }
        fill(bytes_of(lease.record), 100 * turn + index + (backward ? 50 : 0));
        ring.release(std::move(lease), true);
      }
    ring.flush();
  }
}

}  // namespace
}  // namespace flux::engine
