// tests/unit/common/dist/as_ranks.h - several ranks in one process.
#pragma once
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "common/dist/group.h"
#include "tests/support/temporary_folder.h"

namespace flux::dist {

inline constexpr GroupOptions kQuick{.start = std::chrono::seconds(20),
                                     .silence = std::chrono::seconds(5),
                                     .operation = std::chrono::seconds(60)};

inline Launch rank_of(int64_t rank, int64_t world) {
  return {.rank = rank,
          .world = world,
          .local_rank = rank,
          .local_world = world,
          .launcher = "flags",
          .job = "test"};
}

/// Runs `work` as every rank of a group, each in a thread; what it threw, by rank.
inline std::vector<std::string> as_ranks(int64_t world,
                                         const std::function<void(Group& group)>& work,
                                         const GroupOptions& options = kQuick) {
  const test::TemporaryFolder folder;
  std::vector<std::string> errors(static_cast<size_t>(world));
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < world; ++rank)
    threads.emplace_back([&, rank] {
      try {
        const auto group = Group::join(rank_of(rank, world), folder.path() / "address", options);
        work(*group);
      } catch (const std::exception& error) {
        errors[static_cast<size_t>(rank)] = error.what();
      }
    });
  for (auto& thread : threads) thread.join();
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()))
      << "the address is removed when all have come";
  return errors;
}

}  // namespace flux::dist
