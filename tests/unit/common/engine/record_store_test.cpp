#include "common/engine/record_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>

#include "common/core/error.h"
#include "common/engine/file_arena.h"
#include "common/engine/record_layout.h"
#include "tests/support/temporary_folder.h"

namespace flux::engine {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::vector<std::byte> random_bytes(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(count);
  for (auto& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

/// The same of every store that is written to.
void expect_keeps_records(RecordStore& store) {
  ASSERT_TRUE(store.writable());
  std::vector<std::vector<std::byte>> expected;
  for (int64_t i = 0; i < store.num_records(); ++i) {
    const auto bytes = static_cast<size_t>(store.record_bytes(i));
    std::vector<std::byte> fresh(bytes, std::byte{1});
    store.read(i, fresh);
    EXPECT_EQ(fresh, std::vector<std::byte>(bytes)) << "not zero at first";
    expected.push_back(random_bytes(bytes, static_cast<uint32_t>(i)));
    store.write(i, expected.back());
  }
  std::mt19937 random(5);
  for (int round = 0; round < 200; ++round) {
    const auto i = std::uniform_int_distribution<int64_t>(0, store.num_records() - 1)(random);
    auto& record = expected[static_cast<size_t>(i)];
    const auto units = store.record_bytes(i) / kSliceAlignment;
    const auto first = std::uniform_int_distribution<int64_t>(0, units)(random);
    const auto count = std::uniform_int_distribution<int64_t>(0, units - first)(random);
    const auto begin = static_cast<size_t>(first * kSliceAlignment),
               bytes = static_cast<size_t>(count * kSliceAlignment);
    if (round % 3 == 0) {
      const auto part = random_bytes(bytes, static_cast<uint32_t>(round));
      store.write(i, first * kSliceAlignment, part);
      std::copy(part.begin(), part.end(), record.begin() + static_cast<int64_t>(begin));
    }
    // memory of any alignment
    std::vector<std::byte> got(bytes + 64);
    const auto shift = static_cast<size_t>(round % 7);
    store.read(i, first * kSliceAlignment, {got.data() + shift, bytes});
    ASSERT_EQ(std::memcmp(got.data() + shift, record.data() + begin, bytes), 0) << round;
  }
  std::vector<std::byte> some(128);
  EXPECT_THROW(store.read(store.num_records(), 0, some), std::invalid_argument);
  EXPECT_THROW(store.read(-1, 0, some), std::invalid_argument);
  EXPECT_THROW(store.read(0, 1, some), std::invalid_argument);
  EXPECT_THROW(store.read(0, store.record_bytes(0) - 64, some), std::invalid_argument);
  EXPECT_THROW(store.write(0, store.record_bytes(0) - 64, some), std::invalid_argument);
}

const std::vector<int64_t> kSizes{4096, 12'288, 6 << 20, 4096};

TEST(MemoryStore, KeepsRecords) {
  MemoryStore store(kSizes, MemoryStore::Pin::kIfPossible);
  expect_keeps_records(store);
}

TEST(MemoryStore, IsCountedWhileItLives) {
  const int64_t before = cpu_memory().live;
  {
    const MemoryStore store(kSizes);
    EXPECT_EQ(cpu_memory().live - before, std::reduce(kSizes.begin(), kSizes.end()));
  }
  EXPECT_EQ(cpu_memory().live, before);
}

TEST(FileArena, KeepsRecords) {
  const test::TemporaryFolder folder;
  for (const FileAccess access : {FileAccess::kCached, FileAccess::kDropped, FileAccess::kDirect}) {
    SCOPED_TRACE(static_cast<int>(access));
    FileArena store(folder.path(), kSizes, access);
    expect_keeps_records(store);
  }
}

TEST(ChooseAccess, LeavesWhatFitsToThePageCache) {
  EXPECT_EQ(choose_access(FileAccess::kAuto, 50, 100), FileAccess::kCached);
  EXPECT_EQ(choose_access(FileAccess::kAuto, 51, 100), FileAccess::kDirect);
  EXPECT_EQ(choose_access(FileAccess::kDropped, 51, 100), FileAccess::kDropped);
  EXPECT_EQ(choose_access(FileAccess::kAuto, 4096), FileAccess::kCached);
  EXPECT_EQ(choose_access(FileAccess::kAuto, int64_t{1} << 60), FileAccess::kDirect);
  EXPECT_GT(available_memory_bytes(), int64_t{1} << 20);
  EXPECT_LT(available_memory_bytes(), int64_t{1} << 50);
}

TEST(FileArena, KeepsRecordsWrittenAndReadByThreads) {
  const test::TemporaryFolder folder;
  FileArena store(folder.path(), std::vector<int64_t>(8, 64 << 10), FileAccess::kDirect);
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int round = 0; round < 50; ++round)
        for (const int64_t index : {t, t + 4}) {
          const auto bytes = random_bytes(64 << 10, static_cast<uint32_t>(round * 8 + index));
          store.write(index, bytes);
          std::vector<std::byte> got(bytes.size());
          store.read(index, got);
          wrong += got != bytes;
        }
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

std::string refusal(const std::filesystem::path& folder, std::vector<int64_t> sizes) {
  try {
    const FileArena arena(folder, std::move(sizes));
    return "accepted";
  } catch (const ResourceError& error) {
    return error.what();
  }
}

TEST(FileArena, NamesTheBytesNeededAndFree) {
  const test::TemporaryFolder folder;
  // more than any disk here has
  const int64_t needed = int64_t{1} << 55;
  EXPECT_THAT(refusal(folder.path(), {needed}),
              AllOf(HasSubstr(folder.path().string()),
                    HasSubstr(std::to_string(needed) + " bytes"),
                    HasSubstr("are free"),
                    HasSubstr("hint:")));
}

TEST(FileArena, ReservesItsBlocksWhenItIsMade) {
  const test::TemporaryFolder folder;
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{1 << 20, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto message = refusal(folder.path(), {2 << 20});
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_THAT(message, AllOf(HasSubstr("2097152 bytes"), HasSubstr("File too large")));
}

TEST(FileArena, MakesItsFolderOrNamesIt) {
  const test::TemporaryFolder folder;
  EXPECT_EQ(refusal(folder / "absent", {4096}), "accepted");
  EXPECT_THAT(refusal("/proc/none", {4096}),
              AllOf(HasSubstr("/proc/none"), HasSubstr("cannot be made")));
}

/// The test fails where room is not given back.
TEST(FileArena, LeavesNothingWhenTheProcessIsKilled) {
  const test::TemporaryFolder folder;
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  if (child == 0) {
    FileArena arena(folder.path(), {8 << 20});
    arena.write(0, random_bytes(8 << 20, 1));
    const bool nameless = std::filesystem::is_empty(folder.path());
    const char done = nameless ? 'y' : 'n';
    if (write(ready[1], &done, 1) != 1) _exit(1);
    pause();
    _exit(0);
  }
  char answer = 0;
  ASSERT_EQ(read(ready[0], &answer, 1), 1);
  EXPECT_EQ(answer, 'y');
  kill(child, SIGKILL);
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  close(ready[0]);
  close(ready[1]);
}

TEST(CopyRecords, CopiesEveryByte) {
  const test::TemporaryFolder folder;
  MemoryStore from(kSizes);
  for (int64_t i = 0; i < from.num_records(); ++i)
    from.write(i, random_bytes(from.record(i).size(), static_cast<uint32_t>(i)));
  FileArena to(folder.path(), kSizes);
  copy_records(from, to);
  for (int64_t i = 0; i < from.num_records(); ++i) {
    std::vector<std::byte> got(from.record(i).size());
    to.read(i, got);
    EXPECT_EQ(std::memcmp(got.data(), from.record(i).data(), got.size()), 0) << i;
  }
  MemoryStore other({4096});
  EXPECT_THROW(copy_records(from, other), std::invalid_argument);
}

TEST(PlannedStore, HasSizesOnly) {
  const PlannedStore store({4096, 8192}, false);
  EXPECT_EQ(store.record_bytes(1), 8192);
  std::vector<std::byte> bytes(4096);
  EXPECT_THROW(store.read(0, bytes), std::logic_error);
}

}  // namespace
}  // namespace flux::engine
