// Steps whose micro-batches run in several ranks (threads here), against one rank that accumulates them.
#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <thread>

#include "common/engine/gradient_exchange.h"
#include "common/engine/model_blocks.h"
#include "common/engine/updater.h"
#include "tests/support/temporary_folder.h"
#include "tests/unit/common/engine/small_model.h"

namespace flux::engine {
namespace {

using std::chrono::seconds;
using Values = std::map<std::string, at::Tensor>;

constexpr int64_t kMicroBatches = 4;

struct Setting {
  bool full = false, exact = false;
  ClipMode clip = ClipMode::kGlobal;
  OptimizerOptions optimizer = AdamWOptions{};
  int64_t resident = -1;
  bool stream_adapters = false;
};

class StepOfRanks : public testing::Test {
 protected:
  void SetUp() override { write_small_model(config_, folder_.path() / "flux.safetensors"); }

  /// All trained tensors and states after three steps of one rank.
  Values train_rank(const Setting& run, const Ranks& ranks) const {
    const auto optimizer = make_optimizer(run.optimizer);
    ModelFileOptions read;
    read.dtype = at::kFloat;
    auto file = std::make_shared<ModelFile>(folder_.path() / "flux.safetensors", read);
    const bool waits = run.clip == ClipMode::kGlobal || optimizer->two_phase();
    ModelBlocks model(config_,
                      file,
                      *optimizer,
                      {.compute = at::kFloat,
                       .train_weights = run.full,
                       .resident_blocks = run.resident,
                       .scratch = folder_.path(),
                       .keep_gradients = waits,
                       .several_micro_batches = true,
                       .stream_adapters = run.stream_adapters});
    if (!run.full)
      model.train(lora::make_adapters(lora::with_rank(lora::default_targets(config_), 4, 4), 7));
    BlockLoop loop(config_, model, {.first_trained = model.first_trained()});
    GradientExchange exchange(ranks);
    Updater updater(model,
                    *optimizer,
                    {.clip = run.clip,
                     .max_norm = 0.05,
                     .seed = 5,
                     .exchange = ranks.several() ? &exchange : nullptr});
    const int64_t rank = ranks.group ? ranks.group->rank() : 0;
    Values out;
    for (int64_t step = 1; step <= 3; ++step) {
      const auto all =
          small_batches(config_, kMicroBatches, true, at::kCPU, static_cast<uint64_t>(step));
      std::vector<MicroBatch> own;
      for (int64_t j = rank; j < kMicroBatches; j += ranks.world)
        own.push_back(all[static_cast<size_t>(j)]);
      updater.begin(step, 1e-2);
      loop.step(own, updater.hooks());
      const auto norm = updater.finish();
      out["norm " + std::to_string(step)] = at::ones({1}, at::kDouble) * norm.value_or(0);
    }
    updater.flush();
    model.for_all_trainables([&](const Trainable& t) {
      out[t.name] = t.value.detach().clone();
      for (size_t i = 0; i < t.states.size(); ++i)
        out[t.name + " state " + std::to_string(i)] = t.states[i].clone();
      return false;
    });
    return out;
  }

  /// Of every rank.
  std::vector<Values> train(const Setting& run, int64_t world) const {
    if (world == 1) return {train_rank(run, {})};
    std::vector<Values> out(static_cast<size_t>(world));
    std::vector<std::string> errors(out.size());
    std::vector<std::thread> threads;
    for (int64_t rank = 0; rank < world; ++rank)
      threads.emplace_back([&, rank] {
        const auto i = static_cast<size_t>(rank);
        try {
          const auto group =
              dist::Group::join({.rank = rank, .world = world, .launcher = "flags", .job = "test"},
                                folder_.path() / "address",
                                {.start = seconds(60), .silence = seconds(30)});
          out[i] = train_rank(run, {.group = group.get(), .world = world, .exact = run.exact});
          group->leave();
        } catch (const std::exception& error) {
          errors[i] = error.what();
        }
      });
    for (auto& thread : threads) thread.join();
    for (const std::string& error : errors) EXPECT_EQ(error, "");
    return out;
  }

  static void expect_equal(const Values& a, const Values& b) {
    ASSERT_EQ(a.size(), b.size());
    for (const auto& [name, tensor] : a) EXPECT_TRUE(at::equal(tensor, b.at(name))) << name;
  }

  dit::Config config_ = small_config(2, 3);
  test::TemporaryFolder folder_;
};

TEST_F(StepOfRanks, ExactSumsHaveTheBitsOfOneRank) {
  for (Setting run : {Setting{},
                      Setting{.clip = ClipMode::kPerParameter},
                      Setting{.clip = ClipMode::kNone},
                      Setting{.optimizer = ProdigyOptions{}},
                      Setting{.resident = 2, .stream_adapters = true},
                      Setting{.full = true},
                      Setting{.full = true, .resident = 1},
                      Setting{.full = true, .clip = ClipMode::kNone}}) {
    const Values expected = train(run, 1)[0];
    run.exact = true;
    for (const Values& rank : train(run, 2)) expect_equal(expected, rank);
  }
}

TEST_F(StepOfRanks, HaveTheSameBitsAmongEachOtherAndNearlyThoseOfOneRank) {
  for (const Setting& run : {Setting{},
                             Setting{.clip = ClipMode::kPerParameter},
                             Setting{.resident = 0, .stream_adapters = true},
                             Setting{.full = true}}) {
    const Values expected = train(run, 1)[0];
    const auto two = train(run, 2);
    expect_equal(two[0], two[1]);
    for (const auto& [name, tensor] : expected)
      EXPECT_TRUE(at::allclose(tensor, two[0].at(name), 1e-3, 1e-5)) << name;
    // one micro-batch each: their order is that of the step
    for (const Values& rank : train(run, 4)) expect_equal(expected, rank);
  }
}

}  // namespace
}  // namespace flux::engine
