#include "common/dist/group.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <gmock/gmock.h>

#include <functional>
#include <thread>

#include "common/core/error.h"
#include "common/dist/meeting.h"
#include "tests/support/temporary_folder.h"

namespace flux::dist {
namespace {

using std::chrono::seconds;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr GroupOptions kQuick{
    .start = seconds(20), .silence = seconds(5), .operation = seconds(60)};

Launch rank_of(int64_t rank, int64_t world) {
  return {.rank = rank,
          .world = world,
          .local_rank = rank,
          .local_world = world,
          .launcher = "flags",
          .job = "test"};
}

/// Runs `work` as every rank of a group, each in a thread; what it threw, by rank.
std::vector<std::string> as_ranks(int64_t world,
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

class GroupOf : public testing::TestWithParam<int64_t> {};

TEST_P(GroupOf, RanksComputesWhatTheOperationsSay) {
  const int64_t world = GetParam();
  const auto errors = as_ranks(world, [&](Group& group) {
    const int64_t rank = group.rank();
    EXPECT_EQ(group.world(), world);
    const int64_t sum_of_ranks = world * (world - 1) / 2;
    for (const auto type : {at::kFloat, at::kDouble, at::kLong}) {
      const at::Tensor t = at::full({1000}, rank, type);
      group.all_reduce(t);
      EXPECT_TRUE(t.eq(sum_of_ranks).all().item<bool>());
    }
    const at::Tensor own = at::full({3}, rank, at::kFloat);
    const at::Tensor gathered = at::empty({world * 3}, at::kFloat);
    group.all_gather(gathered, own);
    EXPECT_TRUE(
        gathered.view({world, 3}).eq(at::arange(world).view({world, 1})).all().item<bool>());

    const at::Tensor sent = at::arange(world, at::kByte) + rank * 16,
                     received = at::empty({world}, at::kByte);
    group.all_to_all(received.view(at::kByte), sent.to(at::kByte));
    EXPECT_TRUE(received.equal((at::arange(world) * 16 + rank).to(at::kByte)));

    const at::Tensor from = at::full({5}, rank, at::kByte);
    group.broadcast(from, world - 1);
    EXPECT_TRUE(from.eq(world - 1).all().item<bool>());

    const auto said = group.gather("word", std::string(static_cast<size_t>(rank), 'x'));
    EXPECT_EQ(said.size(), static_cast<size_t>(rank == 0 ? world : 0));
    if (rank == 0) {
      EXPECT_EQ(said.back().size(), static_cast<size_t>(world - 1));
    }
    EXPECT_EQ(group.share("verdict", rank == 0 ? "yes" : "never read"), "yes");
    group.leave();
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

INSTANTIATE_TEST_SUITE_P(Sizes, GroupOf, testing::Values(2, 3, 4));

TEST(Group, SaysWhichRankFailedAndWhy) {
  const auto errors = as_ranks(3, [&](Group& group) {
    if (group.rank() == 2) {
      group.fail("its disk is full");
      return;
    }
    group.all_reduce(at::full({4}, 1.0f));  // rank 2 never comes
  });
  EXPECT_EQ(errors[2], "");
  for (const int64_t rank : {0, 1})
    EXPECT_THAT(errors[static_cast<size_t>(rank)],
                AllOf(HasSubstr("rank 2 of 3 (process "),
                      HasSubstr("ended: its disk is full"),
                      HasSubstr("hint:")));
}

TEST(Meeting, NamesTheRanksThatDidNotCome) {
  const test::TemporaryFolder folder;
  try {
    meet(rank_of(0, 3), folder.path() / "address", seconds(1));
    FAIL() << "it met nobody";
  } catch (const ResourceError& error) {
    EXPECT_THAT(error.what(),
                AllOf(HasSubstr("rank 1, 2 did not come within 1 s"), HasSubstr("hint:")));
  }
}

TEST(Meeting, IsNotHeldWhereALeftoverFileSays) {
  const test::TemporaryFolder folder;
  // a port that nobody listens at, and one of another program
  folder.write("address",
               R"({"port": 1, "addresses": ["127.0.0.1"], "number": "0123456789abcdef"})");
  try {
    meet(rank_of(1, 2), folder.path() / "address", seconds(1));
    FAIL() << "it met nobody";
  } catch (const ResourceError& error) {
    EXPECT_THAT(error.what(), HasSubstr("has not written its address to"));
  }
}

}  // namespace
}  // namespace flux::dist
