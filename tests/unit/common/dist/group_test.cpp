#include "common/dist/group.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <gmock/gmock.h>

#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <atomic>
#include <functional>
#include <thread>

#include "common/core/error.h"
#include "common/dist/meeting.h"
#include "tests/support/temporary_folder.h"
#include "tests/unit/common/dist/as_ranks.h"

namespace flux::dist {
namespace {

using std::chrono::seconds;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

class GroupOf : public testing::TestWithParam<int64_t> {};

TEST_P(GroupOf, RanksComputesWhatTheOperationsSay) {
  const int64_t world = GetParam();
  const auto errors = as_ranks(world, [&](Group& group) {
    const int64_t rank = group.rank();
    EXPECT_EQ(group.world(), world);
    const at::Tensor own = at::full({3}, rank, at::kFloat);
    const at::Tensor gathered = at::empty({world * 3}, at::kFloat);
    group.all_gather(gathered, own);
    EXPECT_TRUE(
        gathered.view({world, 3}).eq(at::arange(world).view({world, 1})).all().item<bool>());
    // of any type, from its place
    const at::Tensor all = at::full({world, 2}, -1, at::kBFloat16);
    all[rank].fill_(rank);
    group.all_gather(all, all[rank]);
    EXPECT_TRUE(all.eq(at::arange(world).view({world, 1})).all().item<bool>());

    // in several pieces, the last one smaller
    const at::Tensor large = at::full({world, (3 << 20) + 5}, -1, at::kInt);
    large[rank].copy_(at::arange(large.size(1)) * world + rank);
    group.all_gather(large, large[rank]);
    EXPECT_TRUE(large.t().reshape({-1}).equal(at::arange(large.numel(), at::kInt)));

    const at::Tensor sent = at::arange(world, at::kByte) + rank * 16,
                     received = at::empty({world}, at::kByte);
    group.start_all_to_all(received, sent);
    group.wait();
    EXPECT_TRUE(received.equal((at::arange(world) * 16 + rank).to(at::kByte)));

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

/// `group` [world, 1000] gathered from what is of its ranks only, `times` times.
void use(Group& group, int64_t value, int64_t times) {
  for (int64_t i = 0; i < times; ++i) {
    const at::Tensor own = at::full({1000}, value + i, at::kLong);
    const at::Tensor all = at::empty({group.world(), 1000}, at::kLong);
    group.all_gather(all, own);
    EXPECT_EQ(all.sum().item<int64_t>(), 1000 * group.world() * (value + i));
    const at::Tensor received = at::empty({group.world()}, at::kLong);
    group.start_all_to_all(received,
                           at::full({group.world()}, value, at::kLong) + at::arange(group.world()));
    group.wait();
    EXPECT_TRUE(received.eq(value + group.rank()).all().item<bool>());
  }
}

TEST_P(GroupOf, PartsAreUsedByTwoThreadsAtOnce) {
  const int64_t world = GetParam();
  std::vector<int64_t> all;
  for (int64_t rank = 0; rank < world; ++rank) all.push_back(rank);
  const auto errors = as_ranks(world, [&](Group& group) {
    const auto one = group.part("one", all), other = group.part("other", all);
    EXPECT_EQ(one->rank(), group.rank());
    EXPECT_EQ(one->world(), world);
    std::thread thread([&] { use(*one, 1, 200); });
    std::thread second([&] { use(*other, 1 << 20, 200); });
    use(group, 1 << 30, 200);
    thread.join();
    second.join();
    group.leave();
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

TEST_P(GroupOf, PartsOfOneRankCopy) {
  const auto errors = as_ranks(GetParam(), [&](Group& group) {
    const std::vector<int64_t> alone{group.rank()};
    const auto part = group.part("alone", alone);
    EXPECT_EQ(part->rank(), 0);
    EXPECT_EQ(part->world(), 1);
    use(*part, group.rank(), 2);
    const at::Tensor whole = at::full({3}, 7.0f);
    part->all_gather(whole, whole);
    EXPECT_TRUE(whole.eq(7).all().item<bool>());
    part->barrier();
    EXPECT_THAT(part->gather("word", "x"), ElementsAre("x"));
    EXPECT_EQ(part->share("word", "y"), "y");
    group.leave();
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

TEST(Group, DividesInto02And13) {
  const auto errors = as_ranks(4, [&](Group& group) {
    const int64_t of = group.rank() % 2;
    const std::vector<int64_t> across{of, of + 2};
    const std::vector<int64_t> within{group.rank() / 2 * 2, group.rank() / 2 * 2 + 1};
    const auto replicas = group.part("replicas", across);
    const auto shards = group.part("shards", within);
    EXPECT_EQ(replicas->rank(), group.rank() / 2);
    EXPECT_EQ(shards->rank(), group.rank() % 2);
    use(*replicas, 100 + of, 20);
    use(*shards, 200 + group.rank() / 2, 20);
    const auto said = replicas->gather("rank", std::to_string(group.rank()));
    if (group.rank() < 2) {
      EXPECT_THAT(said, ElementsAre(std::to_string(of), std::to_string(of + 2)));
    }
    EXPECT_EQ(shards->share("first", std::to_string(group.rank())),
              std::to_string(group.rank() / 2 * 2));
    // and a part of a part
    const std::vector<int64_t> last{1};
    if (shards->rank() == 1) {
      EXPECT_EQ(shards->part("last", last)->world(), 1);
    }
    group.leave();
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

TEST(Group, RefusesPartsThatAreNone) {
  const auto errors = as_ranks(2, [&](Group& group) {
    const std::vector<std::vector<int64_t>> wrong{
        {}, {1 - group.rank()}, {1, 0}, {0, 0, 1}, {0, 1, 2}, {-1, 0, 1}};
    for (const auto& ranks : wrong) EXPECT_THROW(group.part("x", ranks), std::invalid_argument);
    const std::vector<int64_t> all{0, 1};
    EXPECT_THROW(group.part("y", all)->leave(), std::invalid_argument);
    group.leave();
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

TEST(Group, AFailureEndsWhatWaitsInAPart) {
  const std::vector<int64_t> two{0, 1};
  const auto errors = as_ranks(3, [&](Group& group) {
    if (group.rank() == 2) {
      std::this_thread::sleep_for(seconds(1));
      group.fail("its disk is full");
      return;
    }
    const auto part = group.part("two", two);
    std::string error;
    std::thread other([&] {
      try {
        if (group.rank() == 0) part->barrier();  // rank 1 never comes
        if (group.rank() == 1) part->share("never", "");
      } catch (const ResourceError& e) {
        error = e.what();
      }
    });
    other.join();
    EXPECT_THAT(error, HasSubstr("ended: its disk is full"));
    group.barrier();
  });
  EXPECT_EQ(errors[2], "");
  for (const size_t rank : {0, 1}) EXPECT_THAT(errors[rank], HasSubstr("ended: its disk is full"));
}

TEST(Group, DoesNotEndAProcessThatWritesACheckpoint) {
  const auto errors = as_ranks(2, [&](Group& group) {
    if (group.rank() == 1) {
      group.fail("its disk is full");
      return;
    }
    const auto finishing = group.finishing();
    std::this_thread::sleep_for(seconds(13));  // more than any other work may take
    group.barrier();
  });
  EXPECT_THAT(errors[0], HasSubstr("ended: its disk is full"));
}

TEST(Group, SaysThatRankZeroIsGoneWithItsStore) {
  const std::vector<int64_t> two{0, 1};
  for (const bool parts : {true, false}) {
    const auto errors = as_ranks(2, [&](Group& group) {
      if (group.rank() == 0) return;  // and its store goes
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
      if (parts)
        group.part("two", two);
      else
        group.gather("what", "it says");
      group.barrier();
    });
    EXPECT_EQ(errors[0], "");
    EXPECT_THAT(errors[1],
                AllOf(HasSubstr("rank 0 of 2 was killed, ended or cannot be reached"),
                      HasSubstr("hint:")));
  }
}

TEST(Group, SaysWhichRankFailedAndWhy) {
  const auto errors = as_ranks(3, [&](Group& group) {
    if (group.rank() == 2) {
      group.fail("its disk is full");
      return;
    }
    group.barrier();  // rank 2 never comes
  });
  EXPECT_EQ(errors[2], "");
  for (const int64_t rank : {0, 1})
    EXPECT_THAT(errors[static_cast<size_t>(rank)],
                AllOf(HasSubstr("rank 2 of 3 (process "),
                      HasSubstr("ended: its disk is full"),
                      HasSubstr("hint:")));
}

/// What torchrun's agent keeps while it starts ranks again.
class MeetingAtOneStore : public testing::Test {
 protected:
  static Launch hosted(int64_t rank, int64_t world) {
    Launch out = rank_of(rank, world);
    out.launcher = "torchrun";
    out.host = "127.0.0.1";
    out.port = static_cast<const c10d::TCPStore&>(*agent()).getPort();
    out.hosted = true;
    return out;
  }
  static c10::intrusive_ptr<c10d::TCPStore> agent() {
    static const auto store = [] {
      c10d::TCPStoreOptions options;
      options.port = 0;
      options.isServer = true;
      options.waitWorkers = false;
      options.useLibUV = false;
      return c10::make_intrusive<c10d::TCPStore>("127.0.0.1", options);
    }();
    return store;
  }
  /// Both ranks of an attempt; what rank 0 said to rank 1.
  static std::string meet_both(const std::string& says) {
    std::string heard;
    std::thread second([&] {
      const Meeting its = meet(hosted(1, 2), {}, seconds(20));
      while (!its.store->check({"said"})) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      heard = its.store_of_watch->get_to_str("said");
    });
    const Meeting mine = meet(hosted(0, 2), {}, seconds(20));
    EXPECT_FALSE(mine.store->check({"said"})) << "of the attempt before";
    mine.store->set("said", says);
    second.join();
    return heard;
  }
};

TEST_F(MeetingAtOneStore, KnowsNothingOfTheAttemptBefore) {
  EXPECT_EQ(meet_both("one"), "one");
  EXPECT_EQ(meet_both("two"), "two");
  // one that only some ranks came to
  EXPECT_THROW(meet(hosted(0, 2), {}, seconds(1)), ResourceError);
  EXPECT_EQ(meet_both("three"), "three");
  static_cast<c10d::Store&>(*agent()).set("flux-stages/test/ask/1", "one that was killed");
  EXPECT_EQ(meet_both("four"), "four");
}

TEST_F(MeetingAtOneStore, FollowsTheNewRankZeroIfTheOldOneIsStillThere) {
  // of three ranks the old rank 0 and the new rank 1 come first, then the new rank 0, then rank 2
  std::vector<std::thread> ranks;
  ranks.emplace_back([] { EXPECT_THROW(meet(hosted(0, 3), {}, seconds(2)), ResourceError); });
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  std::atomic<int> met = 0;
  ranks.emplace_back([&] {
    const Meeting its = meet(hosted(1, 3), {}, seconds(20));
    if (its.store->get_to_str("said") == "new") ++met;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  ranks.emplace_back([&] {
    const Meeting its = meet(hosted(0, 3), {}, seconds(20));
    its.store->set("said", "new");
    ++met;
  });
  std::this_thread::sleep_for(seconds(3));  // the old one gives up
  ranks.emplace_back([&] {
    const Meeting its = meet(hosted(2, 3), {}, seconds(20));
    if (its.store->get_to_str("said") == "new") ++met;
  });
  for (auto& rank : ranks) rank.join();
  EXPECT_EQ(met, 3);
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
