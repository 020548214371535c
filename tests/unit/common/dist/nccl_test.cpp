// Which tensors go to which backend, and what becomes of NCCL's when a rank fails; with a backend in place of NCCL's that
// takes Meta tensors, since here is no GPU.
#include "common/dist/nccl.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <gmock/gmock.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <atomic>
#include <mutex>

#include "common/core/error.h"
#include "tests/unit/common/dist/as_ranks.h"

namespace flux::dist {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

struct FakeWork : c10d::Work {
  /// As WorkNCCL's.
  bool isSuccess() const override { throw std::logic_error("deprecated"); }
  void synchronize() override { ++synchronized; }
  void end(std::exception_ptr error = nullptr) { finish(std::move(error)); }
  std::atomic<int> synchronized = 0;
};

enum class Behaviour { kWorks, kNeverEnds, kFails, kDoesNotStart };

struct FakeBackend : c10d::Backend {
  explicit FakeBackend(const BackendPlace& at)
      : Backend(static_cast<int>(at.rank), static_cast<int>(at.world)), place(at) {}
  const std::string getBackendName() const override { return "fake"; }

  c10::intrusive_ptr<c10d::Work> all_gather_single(at::Tensor& all,
                                                   at::Tensor& own,
                                                   const c10d::AllgatherOptions&) override {
    EXPECT_EQ(all.numel(), own.numel() * getSize());
    return begin("all_gather", all);
  }
  c10::intrusive_ptr<c10d::Work> all_to_all_single(at::Tensor& received,
                                                   at::Tensor& sent,
                                                   std::vector<int64_t>&,
                                                   std::vector<int64_t>&,
                                                   const c10d::AllToAllOptions&) override {
    EXPECT_EQ(received.numel(), sent.numel());
    return begin("all_to_all", received);
  }
  void abort() override { ++aborted; }
  void shutdown() override {
    ++ended;
    throw std::runtime_error("NCCL is confused");  // at the end of a run, all of which is saved
  }

  c10::intrusive_ptr<c10d::Work> begin(const std::string& name, const at::Tensor& tensor) {
    EXPECT_EQ(tensor.scalar_type(), at::kByte);
    calls.push_back(name);
    if (behaviour == Behaviour::kDoesNotStart)
      C10_THROW_ERROR(DistBackendError, "NCCL error: invalid usage\nDuplicate GPU detected");
    auto work = c10::make_intrusive<FakeWork>();
    works.push_back(work);
    if (behaviour == Behaviour::kWorks) work->end();
    if (behaviour == Behaviour::kFails)
      work->end(
          std::make_exception_ptr(std::runtime_error("NCCL watchdog: remote process exited")));
    return work;
  }

  static inline Behaviour behaviour = Behaviour::kWorks;
  BackendPlace place;
  std::vector<std::string> calls;
  std::vector<c10::intrusive_ptr<FakeWork>> works;
  std::atomic<int> aborted = 0, ended = 0;
};

std::mutex made_mutex;
std::vector<c10::intrusive_ptr<FakeBackend>> made;

c10::intrusive_ptr<c10d::Backend> make_fake(const BackendPlace& place) {
  const std::lock_guard lock(made_mutex);
  return made.emplace_back(c10::make_intrusive<FakeBackend>(place));
}

class GpuTensors : public testing::Test {
 protected:
  void SetUp() override { FakeBackend::behaviour = Behaviour::kWorks; }
  void TearDown() override { made.clear(); }

  static GroupOptions options() {
    GroupOptions out = kQuick;
    out.gpu_backend = &make_fake;
    return out;
  }
  static at::Tensor on_gpu(int64_t num) {
    return at::empty({num}, at::TensorOptions(at::kFloat).device(at::kMeta));
  }
};

TEST_F(GpuTensors, GoToTheirOwnBackendAndOthersToGloo) {
  const auto errors = as_ranks(
      2,
      [](Group& group) {
        group.all_gather(at::empty({2}), at::full({1}, 1.0f));
        group.barrier();
        {
          const std::lock_guard lock(made_mutex);
          EXPECT_TRUE(made.empty()) << "no GPU is touched before it is needed";
        }
        group.barrier();
        group.all_gather(on_gpu(8), on_gpu(4));
        group.start_all_to_all(on_gpu(8), on_gpu(8));
        group.wait();
        const at::Tensor all = at::empty({2}, at::kLong);
        group.all_gather(all, at::full({1}, group.rank(), at::kLong));
        EXPECT_EQ(all[1].item<int64_t>(), 1);
        group.barrier();
        group.leave();
      },
      options());
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  ASSERT_EQ(made.size(), 2u) << "one a rank, made once";
  EXPECT_NE(made[0]->place.rank, made[1]->place.rank);
  for (const auto& backend : made) {
    EXPECT_EQ(backend->place.world, 2);
    EXPECT_TRUE(backend->place.device.is_meta());
    EXPECT_EQ(backend->place.operation, kQuick.operation);
    EXPECT_THAT(backend->calls, ElementsAre("all_gather", "all_to_all"));
    for (const auto& work : backend->works)
      EXPECT_EQ(work->synchronized, 1) << "the stream waits too";
    EXPECT_EQ(backend->ended, 1);
    EXPECT_EQ(backend->aborted, 0);
  }
}

TEST_F(GpuTensors, OfAPartHaveABackendOfItsRanks) {
  const auto errors = as_ranks(
      4,
      [](Group& group) {
        const std::vector<int64_t> ranks{group.rank() % 2, group.rank() % 2 + 2};
        const std::vector<int64_t> alone{group.rank()};
        const auto part = group.part("across", ranks), one = group.part("one", alone);
        part->all_gather(on_gpu(8), on_gpu(4));
        one->all_gather(on_gpu(4), on_gpu(4));  // nobody to talk to
        group.leave();
      },
      options());
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  ASSERT_EQ(made.size(), 4u);
  for (const auto& backend : made) {
    EXPECT_EQ(backend->place.world, 2);
    EXPECT_EQ(backend->ended, 1);
  }
}

TEST_F(GpuTensors, AreAbortedWhenARankFails) {
  FakeBackend::behaviour = Behaviour::kNeverEnds;
  const auto errors = as_ranks(
      3,
      [](Group& group) {
        // one waits for its GPU, one does something else, one fails
        if (group.rank() == 0) group.all_gather(on_gpu(3), on_gpu(1));
        group.start_all_to_all(on_gpu(3), on_gpu(3));
        if (group.rank() == 1) group.barrier();
        std::this_thread::sleep_for(std::chrono::seconds(1));
        group.fail("its disk is full");
      },
      options());
  EXPECT_EQ(errors[2], "");
  for (const size_t rank : {0, 1})
    EXPECT_THAT(errors[rank], AllOf(HasSubstr("rank 2 of 3"), HasSubstr("its disk is full")));
  ASSERT_EQ(made.size(), 3u);
  for (const auto& backend : made) {
    EXPECT_EQ(backend->aborted, 1) << "rank " << backend->place.rank;
    EXPECT_EQ(backend->ended, 0) << "it would wait for the others";
  }
}

TEST_F(GpuTensors, WhoseTransferFailsEndAllRanks) {
  for (const auto& [behaviour, text] :
       {std::pair(Behaviour::kFails, "NCCL watchdog: remote process exited"),
        std::pair(Behaviour::kDoesNotStart, "NCCL error: invalid usage Duplicate GPU detected")}) {
    FakeBackend::behaviour = behaviour;
    made.clear();
    const auto errors = as_ranks(
        2,
        [](Group& group) {
          if (group.rank() == 1) group.all_gather(on_gpu(2), on_gpu(1));
          group.barrier();
        },
        options());
    for (const std::string& error : errors)
      EXPECT_THAT(error, AllOf(HasSubstr("rank 1 of 2"), HasSubstr(text), HasSubstr("hint:")));
    ASSERT_EQ(made.size(), 1u);
    EXPECT_EQ(made[0]->aborted, 1);
  }
}

TEST(Nccl, IsRefusedWhereItsLibraryIsNotOpen) {
  try {
    nccl_backend({.device = at::Device(at::kCUDA, 0)});
    FAIL() << "made by nobody";
  } catch (const ResourceError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("NCCL"), HasSubstr("hint:")));
  }
}

}  // namespace
}  // namespace flux::dist
