// Steps whose micro-batches run in several ranks (threads here), against one rank that accumulates them.
#include <ATen/ops/allclose.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <numeric>
#include <thread>

#include "common/engine/gradient_exchange.h"
#include "common/engine/model_blocks.h"
#include "common/engine/trainer.h"
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
  int64_t shard_world = 1;
  at::ScalarType compute = at::kFloat;
  StreamFrom stream_from = StreamFrom::kFile;
  bool stream_states = false, average = false;
  int64_t kept_graphs = 0;
  enum class Fails { kNever, kInForward, kInBackward } fourth_step = Fails::kNever;
};

class StepOfRanks : public testing::Test {
 protected:
  void SetUp() override { write_small_model(config_, folder_.path() / "flux.safetensors"); }

  /// All trained tensors and states after three steps of one rank.
  Values train_rank(const Setting& run, const Ranks& ranks) const {
    const auto optimizer = make_optimizer(run.optimizer);
    if (run.average) optimizer->keep_average({.decay = 0.9}, at::kBFloat16);
    ModelFileOptions read;
    read.dtype = run.compute;
    const auto kept = blocks_with_kept_graph(
        5, {.resident_blocks = run.resident, .kept_graphs = run.kept_graphs}, ranks.sharded());
    auto file = std::make_shared<ModelFile>(folder_.path() / "flux.safetensors", read);
    const bool waits = run.clip == ClipMode::kGlobal || optimizer->two_phase();
    ModelBlocks model(config_,
                      file,
                      *optimizer,
                      {.compute = run.compute,
                       .train_weights = run.full,
                       .resident_blocks = run.resident,
                       .kept_graphs = kept,
                       .stream_from = run.stream_from,
                       .scratch = folder_.path(),
                       .keep_gradients = waits,
                       .several_micro_batches = true,
                       .stream_adapters = run.stream_adapters,
                       .stream_states = run.stream_states,
                       .sharing = {ranks.shard_world, ranks.shard_rank(), ranks.gather}});
    if (!run.full)
      model.train(lora::make_adapters(lora::with_rank(lora::default_targets(config_), 4, 4), 7));
    BlockLoop loop(config_, model, {.first_trained = model.first_trained(), .keep_graph = kept});
    GradientExchange exchange(ranks, /*piece=*/100'000);  // several a block
    Updater updater(model,
                    *optimizer,
                    {.clip = run.clip,
                     .max_norm = 0.05,
                     .seed = 5,
                     .exchange = ranks.several() ? &exchange : nullptr,
                     .shard_world = ranks.shard_world,
                     .shard = ranks.shard});
    const int64_t rank = ranks.rank;
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
      if (step == 3 && run.fourth_step != Setting::Fails::kNever) break;  // updates wait
      // as validation does
      updater.flush();
      loop.forward_only(own);
    }
    if (run.fourth_step != Setting::Fails::kNever) {
      updater.begin(4, 1e-2);
      LoopHooks hooks = updater.hooks();
      const int64_t middle = 2;
      if (run.fourth_step == Setting::Fails::kInForward)
        hooks.before_forward = [update = hooks.before_forward](int64_t block) {
          if (block == middle) throw std::runtime_error("fails");
          return update(block);
        };
      else
        hooks.ready = [update = hooks.ready](int64_t block, std::span<Trainable> trainables) {
          if (block == middle) throw std::runtime_error("fails");
          return update(block, trainables);
        };
      EXPECT_THROW(loop.step(small_batches(config_, 2, true), hooks), std::runtime_error);
      updater.abandon();
      // a block whose update of the third step waits for its forward has lost it
      const bool lost = run.stream_adapters && run.fourth_step == Setting::Fails::kInForward;
      EXPECT_EQ(updater.is_whole(), !lost);
    }
    updater.flush();
    model.for_all_trainables([&](const Trainable& t) {
      const std::string part = t.whole.empty() ? "" : "@" + std::to_string(t.offset);
      out[t.name + part] = t.value.detach().clone();
      for (size_t i = 0; i < t.states.size(); ++i)
        out[t.name + " state " + std::to_string(i) + part] = t.states[i].clone();
      return false;
    });
    return out;
  }

  /// Puts the parts "NAME@OFFSET" of all ranks of a copy together, as flat as those of one.
  static Values joined(std::span<const Values> ranks) {
    Values out;
    std::map<std::string, std::map<int64_t, at::Tensor>> parts;
    for (const Values& rank : ranks)
      for (const auto& [name, tensor] : rank) {
        const auto at = name.find('@');
        if (at == std::string::npos)
          out[name] = tensor.flatten();
        else
          parts[name.substr(0, at)][std::stoll(name.substr(at + 1))] = tensor;
      }
    for (const auto& [name, of_name] : parts) {
      std::vector<at::Tensor> in_order;
      for (const auto& [offset, tensor] : of_name) in_order.push_back(tensor);
      out[name] = at::cat(in_order);
    }
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
          Ranks ranks{.world = world, .rank = rank, .group = group.get(), .exact = run.exact};
          std::vector<std::unique_ptr<dist::Group>> parts;
          if (run.shard_world > 1) {
            ranks.shard_world = run.shard_world;
            std::vector<int64_t> copy(static_cast<size_t>(run.shard_world));
            std::iota(copy.begin(), copy.end(), rank / run.shard_world * run.shard_world);
            const std::string of_copy = std::to_string(copy[0]);
            ranks.shard = parts.emplace_back(group->part("shard" + of_copy, copy)).get();
            ranks.gather = parts.emplace_back(group->part("gather" + of_copy, copy)).get();
            std::vector<int64_t> same_part;
            for (int64_t r = ranks.shard_rank(); r < world; r += run.shard_world)
              same_part.push_back(r);
            if (ranks.num_replicas() > 1)
              ranks.replica =
                  parts.emplace_back(group->part("same" + std::to_string(same_part[0]), same_part))
                      .get();
          }
          out[i] = train_rank(run, ranks);
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
    for (const auto& [name, tensor] : a)
      EXPECT_TRUE(at::equal(tensor.flatten(), b.at(name).flatten())) << name;
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

TEST_F(StepOfRanks, OneThatFailsChangesNothing) {
  for (Setting run : {Setting{},
                      Setting{.resident = 2, .stream_adapters = true},
                      Setting{.resident = 0, .stream_adapters = true, .kept_graphs = 4}}) {
    const Values expected = train(run, 1)[0];
    for (const auto fails : {Setting::Fails::kInForward, Setting::Fails::kInBackward}) {
      run.fourth_step = fails;
      const Values found = train(run, 1)[0];
      if (!run.stream_adapters || fails == Setting::Fails::kInBackward)
        expect_equal(expected, found);
    }
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

TEST_F(StepOfRanks, SharedWeightsHaveTheBitsOfOneRank) {
  int number = 0;
  for (Setting run : {Setting{},
                      Setting{.resident = 0},
                      Setting{.clip = ClipMode::kPerParameter, .resident = 2},
                      Setting{.clip = ClipMode::kNone, .resident = 1},
                      Setting{.optimizer = AdamW8bitOptions{}, .resident = 2},
                      Setting{.optimizer = LionOptions{}, .compute = at::kBFloat16},
                      Setting{.optimizer = AdamW8bitOptions{},
                      .resident = 1,
                      .compute = at::kBFloat16,
                      .stream_from = StreamFrom::kHost,
                      .stream_states = true,
                      .average = true},
                      Setting{.clip = ClipMode::kNone,
                      .compute = at::kBFloat16,
                      .stream_states = true,
                      .kept_graphs = 2},
                      Setting{.optimizer = SgdOptions{.momentum = 0.9}, .resident = 3}}) {
    SCOPED_TRACE(testing::Message() << "setting " << number++);
    run.full = true;
    const Values expected = train(run, 1)[0];
    run.exact = true;
    for (const int64_t world : {2, 4}) {
      SCOPED_TRACE(testing::Message() << world << " ranks");
      run.shard_world = world;
      expect_equal(expected, joined(train(run, world)));
    }
    // two copies of two parts each
    run.shard_world = 2;
    const auto four = train(run, 4);
    expect_equal(expected, joined(std::span(four).first(2)));
    expect_equal(expected, joined(std::span(four).last(2)));
  }
}

TEST_F(StepOfRanks, SharedWeightsAreNearlyThoseOfOneRankWithSumsOfRanks) {
  for (Setting run : {Setting{.full = true}, Setting{.full = true, .resident = 1}}) {
    const Values expected = train(run, 1)[0];
    for (const auto& [world, shard_world] : {std::pair{2, 2}, {4, 2}}) {
      run.shard_world = shard_world;
      const auto ranks = train(run, world);
      const Values found = joined(std::span(ranks).first(2));
      for (const auto& [name, tensor] : expected)
        EXPECT_TRUE(at::allclose(tensor.flatten(), found.at(name), 1e-3, 1e-5)) << name;
      if (world == 4) expect_equal(found, joined(std::span(ranks).last(2)));
    }
  }
}

}  // namespace
}  // namespace flux::engine
