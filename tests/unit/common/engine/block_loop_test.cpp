// The block-wise loop against plain autograd over dit::forward(), to the bit: the same project ops, gradients of several
// micro-batches summed in float32.
#include "common/engine/block_loop.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>

#include "common/models/flux/names.h"
#include "common/models/lora/lora.h"
#include "common/tensor/memory.h"
#include "tests/unit/common/engine/small_model.h"

namespace flux::engine {
namespace {

/// A model in memory, and what of it is trained.
class Resident final : public Blocks {
 public:
  Resident(const dit::Config& config, at::ScalarType type, bool lora, at::Device device = at::kCPU)
      : config_(config) {
    const auto gen = at::make_generator<at::CPUGeneratorImpl>(4);
    weights_ = dit::empty_weights(config);
    std::map<std::string, at::Tensor> tensors;
    for (const auto& [name, shape] : dit::tensor_shapes(config)) {
      const double size = shape.size() == 2 ? 1.5 / std::sqrt(static_cast<double>(shape[1])) : 0.3;
      tensors[name] = at::randn(shape, gen).mul_(size);
    }
    dit::for_each_tensor(weights_, [&](const std::string& name, at::Tensor& tensor) {
      tensor = tensors.at(name).to(type).to(device).requires_grad_(!lora);
      if (!lora) add({.name = name, .value = tensor});
    });
    if (!lora) return;
    auto adapters = lora::make_adapters(lora::with_rank(lora::default_targets(config), 4, 4), 7);
    for (auto& module : adapters.modules) {
      module.up = at::randn(module.up.sizes(), gen).mul_(0.1);
      for (auto* tensor : {&module.down, &module.up}) {
        *tensor = tensor->to(device).requires_grad_();
        add({.name = module.path + (tensor == &module.down ? ".down" : ".up"), .value = *tensor});
      }
    }
    lora::attach(adapters, weights_);
  }

  const dit::Weights& weights() const override { return weights_; }
  void enter(int64_t block) override {
    EXPECT_TRUE(there_.insert(block).second) << block;
    entered.push_back(block);
  }
  void leave(int64_t block, bool) override { EXPECT_EQ(there_.erase(block), 1u) << block; }
  std::span<Trainable> trainables(int64_t block) override {
    EXPECT_TRUE(there_.contains(block)) << block;
    return trained[block];
  }
  std::span<Trainable> outer_trainables() override { return trained[-1]; }
  bool trainables_stay(int64_t) const override { return true; }
  void visit(std::span<const int64_t> blocks, const std::function<bool(int64_t)>& work) override {
    for (const int64_t block : blocks) work(block);
  }
  void pass(const std::function<bool(int64_t)>& work) override {
    for (int64_t block = 0; block < config_.num_double_blocks + config_.num_single_blocks;
         ++block) {
      enter(block);
      leave(block, work(block));
    }
  }

  std::map<int64_t, std::vector<Trainable>> trained;
  std::vector<int64_t> entered;

 private:
  void add(Trainable trainable) {
    int64_t block = -1;
    for (const auto& [prefix, first] : {std::pair<std::string, int64_t>{"double_blocks.", 0},
                                        {"single_blocks.", config_.num_double_blocks}})
      if (trainable.name.starts_with(prefix))
        block = first + std::stoll(trainable.name.substr(prefix.size()));
    trained[block].push_back(std::move(trainable));
  }
  dit::Config config_;
  dit::Weights weights_;
  std::set<int64_t> there_;
};

using Gradients = std::map<std::string, at::Tensor>;

/// Losses and gradients by plain autograd, the whole graph at once.
std::vector<at::Tensor> plain(const dit::Config& config,
                              Resident& model,
                              std::span<const MicroBatch> micro_batches,
                              Gradients& gradients) {
  std::vector<at::Tensor> losses;
  const bool several = micro_batches.size() > 1;
  for (const MicroBatch& micro : micro_batches) {
    const auto loss = micro.loss(dit::forward(config, model.weights(), micro.inputs));
    loss.backward();
    losses.push_back(loss.detach());
    for (auto& [block, trainables] : model.trained) {
      for (Trainable& t : trainables) {
        auto gradient = std::exchange(t.value.mutable_grad(), at::Tensor());
        if (!gradient.defined()) continue;
        if (several) gradient = gradient.to(at::kFloat);
        auto& sum = gradients[t.name];
        sum = sum.defined() ? sum + gradient : gradient;
      }
    }
  }
  return losses;
}

struct Case {
  at::ScalarType type;
  bool lora;
  int64_t count;
  bool masks;
  std::vector<char> keep_graph;
  InputPlace inputs = InputPlace::kDevice;
};

void expect_equal_bits(const dit::Config& config, const Case& c) {
  SCOPED_TRACE(::testing::Message() << c10::toString(c.type) << (c.lora ? " LoRA " : " full ")
                                    << c.count << " micro-batches, masks " << c.masks);
  Resident model(config, c.type, c.lora);
  const auto micro_batches = small_batches(config, c.count, c.masks);
  Gradients expected;
  const auto losses = plain(config, model, micro_batches, expected);

  BlockLoop loop(config,
                 model,
                 {.first_trained = c.lora ? 0 : -1,
                  .keep_graph = c.keep_graph,
                  .inputs = c.inputs,
                  .scratch = std::filesystem::temp_directory_path()});
  for (int round = 0; round < 2; ++round) {
    std::set<int64_t> seen;
    std::set<std::string> reached;
    const auto ready = [&](int64_t block, std::span<Trainable> trainables) {
      EXPECT_TRUE(seen.insert(block).second);
      for (Trainable& t : trainables) {
        if (t.gradient.defined()) {
          reached.insert(t.name);
          EXPECT_TRUE(expected.contains(t.name)) << t.name;
          if (expected.contains(t.name)) {
            EXPECT_EQ(t.gradient.scalar_type(), expected[t.name].scalar_type()) << t.name;
            EXPECT_TRUE(at::equal(t.gradient, expected[t.name])) << t.name;
          }
        }
        t.gradient.reset();
      }
      return false;
    };
    const auto found = loop.step(micro_batches, {.ready = ready});
    ASSERT_EQ(found.size(), losses.size());
    for (size_t i = 0; i < losses.size(); ++i) EXPECT_TRUE(at::equal(found[i], losses[i]));
    EXPECT_EQ(reached.size(), expected.size());
    const auto without_graph = loop.forward_only(micro_batches);
    ASSERT_EQ(without_graph.size(), losses.size());
    for (size_t i = 0; i < losses.size(); ++i) {
      EXPECT_TRUE(at::equal(without_graph[i], losses[i]));
      EXPECT_FALSE(without_graph[i].requires_grad());
    }
  }
}

TEST(BlockLoop, GradientsHaveTheBitsOfPlainAutograd) {
  const auto config = small_config();
  for (const auto type : {at::kFloat, at::kBFloat16})
    for (const bool lora : {true, false})
      for (const int64_t count : {1, 3})
        for (const bool masks : {false, true})
          expect_equal_bits(config, {type, lora, count, masks, {}});
}

TEST(BlockLoop, KeptGraphsChangeNoBit) {
  const auto config = small_config();
  for (const bool lora : {true, false}) {
    expect_equal_bits(config, {at::kFloat, lora, 2, false, {0, 0, 0, 1, 1}});
    expect_equal_bits(config, {at::kBFloat16, lora, 1, true, {1, 1, 1, 1, 1}});
    expect_equal_bits(config, {at::kBFloat16, lora, 1, true, {1, 0, 0, 1, 0}});
  }
}

TEST(BlockLoop, BlockInputsOnDiskChangeNoBit) {
  expect_equal_bits(small_config(), {at::kBFloat16, true, 2, true, {}, InputPlace::kDisk});
}

TEST(BlockLoop, ModelsWithoutSingleBlocks) {
  expect_equal_bits(small_config(2, 0), {at::kFloat, false, 1, false, {}});
  expect_equal_bits(small_config(2, 0), {at::kFloat, true, 2, true, {}});
}

TEST(BlockLoop, EntersForwardThenBackwardAndKeptBlocksOnce) {
  const auto config = small_config(1, 2);
  Resident model(config, at::kFloat, true);
  BlockLoop loop(config, model, {.first_trained = 0, .keep_graph = {0, 0, 1}});
  const auto ready = [](int64_t, std::span<Trainable>) { return false; };
  loop.step(small_batches(config, 1, false), {.ready = ready});
  EXPECT_EQ(model.entered, (std::vector<int64_t>{0, 1, 2, 1, 0}));
  BlockLoop late(config, model, {.first_trained = 2});
  model.entered.clear();
  late.step(small_batches(config, 1, false), {.ready = ready});
  EXPECT_EQ(model.entered, (std::vector<int64_t>{0, 1, 2, 2}));
}

TEST(BlockLoop, RunsOnMetaAndHoldsNothingAfterwards) {
  count_tensor_memory();
  const auto config = small_config();
  for (const bool lora : {true, false}) {
    Resident model(config, at::kFloat, lora, at::kMeta);
    const auto micro_batches = small_batches(config, 2, true, at::kMeta);
    BlockLoop loop(config, model, {.first_trained = lora ? 0 : -1});
    const auto before = meta_memory().live;
    reset_meta_peak();
    loop.step(micro_batches, {.ready = [](int64_t, std::span<Trainable> trainables) {
                for (Trainable& t : trainables) t.gradient.reset();
                return true;
              }});
    EXPECT_EQ(meta_memory().live, before);
    EXPECT_GT(meta_memory().causes[static_cast<size_t>(MemoryCause::kBlockInputs)], 0);
  }
}

}  // namespace
}  // namespace flux::engine
