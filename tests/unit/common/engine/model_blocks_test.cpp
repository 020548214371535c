// Where weights are must not be seen in the results: steps with all blocks in memory against steps with streamed ones.
#include "common/engine/model_blocks.h"
#include "common/engine/trainer.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cmath>
#include <map>
#include <numeric>

#include "common/engine/updater.h"
#include "common/models/flux/names.h"
#include "tests/unit/common/engine/small_model.h"

namespace flux::engine {
namespace {

class ModelBlocksTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "model_blocks.XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    write_small_model(config_, folder_ / "flux.safetensors");
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  struct Run {
    bool full = false;
    at::ScalarType compute = at::kBFloat16;
    OptimizerOptions optimizer = AdamWOptions{};
    ClipMode clip = ClipMode::kGlobal;
    int64_t micro_batches = 1;
    int64_t resident = -1, lookahead = 1;
    StreamFrom from = StreamFrom::kFile;
    int64_t kept = 0;  // graphs
    bool stream_adapters = false, stream_states = false;
  };

  /// All trained tensors and states after three steps, and the losses.
  std::map<std::string, at::Tensor> train(const Run& run) const {
    const auto optimizer = make_optimizer(run.optimizer);
    ModelFileOptions read;
    read.dtype = run.compute;
    auto file = std::make_shared<ModelFile>(folder_ / "flux.safetensors", read);
    const auto kept = blocks_with_kept_graph(
        6, {.resident_blocks = run.resident, .lookahead = run.lookahead, .kept_graphs = run.kept});
    ModelBlocks model(config_,
                      file,
                      *optimizer,
                      {.compute = run.compute,
                       .train_weights = run.full,
                       .resident_blocks = run.resident,
                       .kept_graphs = kept,
                       .stream_from = run.from,
                       .lookahead = run.lookahead,
                       .scratch = folder_,
                       .keep_gradients = run.clip == ClipMode::kGlobal || optimizer->two_phase(),
                       .several_micro_batches = run.micro_batches > 1,
                       .stream_adapters = run.stream_adapters,
                       .stream_states = run.stream_states});
    if (!run.full) model.train(lora::make_adapters(lora::with_rank(lora::default_targets(config_), 4, 4), 7));
    BlockLoop loop(config_, model, {.first_trained = model.first_trained(), .keep_graph = kept});
    Updater updater(model, *optimizer, {.clip = run.clip, .max_norm = 0.05, .seed = 5});
    std::map<std::string, at::Tensor> out;
    for (int64_t step = 1; step <= 3; ++step) {
      updater.begin(step, 1e-2);
      const auto losses = loop.step(
          small_batches(config_, run.micro_batches, true, at::kCPU, static_cast<uint64_t>(step)),
          updater.hooks());
      const auto norm = updater.finish();
      EXPECT_GT(norm.value_or(1), 0);
      for (size_t i = 0; i < losses.size(); ++i)
        out["loss " + std::to_string(step) + " " + std::to_string(i)] = losses[i];
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

  static void expect_equal(const std::map<std::string, at::Tensor>& a,
                           const std::map<std::string, at::Tensor>& b) {
    ASSERT_EQ(a.size(), b.size());
    for (const auto& [name, tensor] : a) {
      ASSERT_TRUE(b.contains(name)) << name;
      EXPECT_TRUE(at::equal(tensor, b.at(name))) << name;
    }
  }

  dit::Config config_ = small_config(2, 4);
  std::filesystem::path folder_;
};

TEST_F(ModelBlocksTest, LoraDoesNotSeeWhereWeightsAre) {
  for (const auto compute : {at::kFloat, at::kBFloat16}) {
    const auto expected = train({.compute = compute, .micro_batches = 2});
    for (const int64_t resident : {0, 1, 3, 5})
      for (const int64_t lookahead : {1, 3})
        expect_equal(train({.compute = compute,
                            .micro_batches = 2,
                            .resident = resident,
                            .lookahead = lookahead}),
                     expected);
    expect_equal(train({.compute = compute,
                        .micro_batches = 2,
                        .resident = 2,
                        .from = StreamFrom::kHost,
                        .kept = 4}),
                 expected);
    for (const int64_t kept : {1, 2, 3})
      expect_equal(train({.compute = compute,
                          .micro_batches = 2,
                          .resident = 0,
                          .lookahead = 2,
                          .kept = kept}),
                   expected);
  }
}

TEST_F(ModelBlocksTest, LoraDoesNotSeeWhereItsAdaptersAre) {
  for (const auto& optimizer : std::vector<OptimizerOptions>{
           AdamWOptions{}, AdamW8bitOptions{}, ProdigyOptions{.d0 = 1e-3}}) {
    for (const auto clip : {ClipMode::kNone, ClipMode::kGlobal, ClipMode::kPerParameter}) {
      for (const int64_t count : {1, 2}) {
        Run run{.optimizer = optimizer, .clip = clip, .micro_batches = count};
        const auto expected = train(run);
        run.stream_adapters = true;
        for (const int64_t resident : {0, 2, 6}) {
          for (const int64_t kept : {0, 2}) {
            for (const auto from : {StreamFrom::kFile, StreamFrom::kHost}) {
              run.resident = resident;
              run.kept = kept;
              run.from = from;
              expect_equal(train(run), expected);
            }
          }
        }
      }
    }
  }
}

TEST_F(ModelBlocksTest, FullFineTuningDoesNotSeeWhereWeightsAre) {
  const std::vector<OptimizerOptions> optimizers{AdamWOptions{},
                                                 AdamW8bitOptions{},
                                                 AdafactorOptions{},
                                                 ProdigyOptions{.d0 = 1e-3},
                                                 ScheduleFreeOptions{}};
  for (const auto& optimizer : optimizers) {
    for (const auto clip : {ClipMode::kNone, ClipMode::kGlobal, ClipMode::kPerParameter}) {
      for (const int64_t count : {1, 2}) {
        SCOPED_TRACE(::testing::Message() << "optimizer " << optimizer.index() << " clip "
                                          << static_cast<int>(clip) << " micro-batches " << count);
        Run run{.full = true, .optimizer = optimizer, .clip = clip, .micro_batches = count};
        const auto expected = train(run);
        run.resident = 1;
        expect_equal(train(run), expected);
        run.kept = 3;
        expect_equal(train(run), expected);
        run.from = StreamFrom::kHost;
        run.resident = 0;
        run.lookahead = 2;
        expect_equal(train(run), expected);
        run.stream_states = true;
        for (const int64_t resident : {6, 3}) {  // of states alone, of some weights too
          run.resident = resident;
          expect_equal(train(run), expected);
        }
      }
    }
  }
}

TEST(BlocksWithKeptGraph, AreTheLastOnesThatCanBeKept) {
  const auto kept = [](int64_t resident, int64_t lookahead, int64_t count) {
    const auto which = blocks_with_kept_graph(
        6, {.resident_blocks = resident, .lookahead = lookahead, .kept_graphs = count});
    std::string text;
    for (const char c : which) text += c ? 'k' : '-';
    return text;
  };
  EXPECT_EQ(kept(-1, 1, 2), "----kk");
  EXPECT_EQ(kept(0, 1, 1), "-----k");
  EXPECT_EQ(kept(0, 1, 6), "----kk");
  EXPECT_EQ(kept(2, 1, 3), "-k--kk");
  EXPECT_EQ(kept(2, 2, 9), "kk-kkk");
  EXPECT_EQ(kept(0, 1, 0), "------");
}

TEST_F(ModelBlocksTest, EveryTrainedTensorMoves) {
  Run run{.full = true, .compute = at::kFloat};
  const auto after = train(run);
  const auto file = read_weights(folder_ / "flux.safetensors");
  for (const auto& [name, tensor] : file.tensors)
    EXPECT_FALSE(at::equal(after.at(name), tensor.to(at::kFloat))) << name;
}

TEST_F(ModelBlocksTest, NothingOfTheScratchStays) {
  train({.full = true, .resident = 0});
  std::vector<std::filesystem::path> left;
  for (const auto& entry : std::filesystem::directory_iterator(folder_)) left.push_back(entry);
  EXPECT_EQ(left, std::vector<std::filesystem::path>{folder_ / "flux.safetensors"});
}

}  // namespace
}  // namespace flux::engine
