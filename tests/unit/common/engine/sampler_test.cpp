// Pictures from noise: what they become must not depend on where weights are, on the pictures beside them, or on how
// adapters are put in.
#include "common/engine/sampler.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <numeric>

#include "common/engine/plan.h"
#include "common/engine/trainer.h"
#include "common/models/flux/load.h"
#include "common/train/sampler.h"
#include "tests/support/random_batch.h"
#include "tests/unit/common/engine/small_model.h"

namespace flux::engine {
namespace {

class SamplerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    count_tensor_memory();
    std::string name = (std::filesystem::temp_directory_path() / "sampler.XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    write_small_model(config_, folder_ / "flux.safetensors");
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::shared_ptr<ModelFile> file(const SamplerOptions& options) const {
    return std::make_shared<ModelFile>(
        folder_ / "flux.safetensors",
        ModelFileOptions{.dtype = options.compute, .quant = options.base});
  }

  std::vector<SampleInputs> pictures(int64_t count, bool negative = false) const {
    std::vector<SampleInputs> out;
    for (int64_t i = 0; i < count; ++i) {
      const auto gen = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(i + 1));
      SampleInputs in;
      in.noise = sample_noise(3, static_cast<uint64_t>(i), 0, config_.in_channels / 4, 8, 6);
      in.prompt_embedding = at::randn({1, 5, config_.prompt_dim}, gen);
      in.pooled_embedding = at::randn({1, config_.pooled_dim}, gen);
      if (negative) {
        in.negative_embedding = at::randn({1, 5, config_.prompt_dim}, gen);
        in.negative_pooled = at::randn({1, config_.pooled_dim}, gen);
      }
      out.push_back(std::move(in));
    }
    return out;
  }

  static EulerOptions euler(double cfg_scale = 1) {
    return {.sigmas = sampler_schedule(3, 12, true), .guidance = 2.5, .cfg_scale = cfg_scale};
  }

  std::vector<at::Tensor> sample(const SamplerOptions& options,
                                 std::span<const SampleInputs> inputs,
                                 std::span<const WeightedAdapters> adapters = {},
                                 double cfg_scale = 1) const {
    Sampler sampler(config_, file(options), options, adapters);
    return euler_sample(
        [&](std::span<const dit::Inputs> in) { return sampler(in); }, euler(cfg_scale), inputs);
  }

  /// The plain way: whole model, a picture, a step.
  at::Tensor by_hand(const dit::Weights& weights,
                     const SampleInputs& picture,
                     double cfg_scale) const {
    const at::NoGradGuard no_grad;
    const auto sigmas = euler().sigmas;
    at::Tensor x = dit::pack_latents(picture.noise);
    for (size_t i = 0; i + 1 < sigmas.size(); ++i) {
      dit::Inputs in{.img = x,
                     .txt = picture.prompt_embedding,
                     .y = picture.pooled_embedding,
                     .timestep = at::full({1}, sigmas[i]),
                     .guidance = at::full({1}, 2.5),
                     .img_ids = dit::image_ids(8, 6),
                     .txt_ids = dit::text_ids(5),
                     .text_mask = std::nullopt};
      at::Tensor velocity = dit::forward(config_, weights, in);
      if (picture.negative_embedding.defined()) {
        in.txt = picture.negative_embedding;
        in.y = picture.negative_pooled;
        const at::Tensor negative = dit::forward(config_, weights, in);
        velocity = negative + cfg_scale * (velocity - negative);
      }
      x = x + (static_cast<double>(sigmas[i + 1]) - static_cast<double>(sigmas[i])) * velocity;
    }
    return dit::unpack_latents(x, 8, 6);
  }

  dit::Weights weights() const {
    return dit::load_model(folder_ / "flux.safetensors", at::kFloat).weights;
  }

  lora::Adapters adapters(uint64_t seed, lora::Form form = {}, int64_t rank = 4) const {
    const auto gen = at::make_generator<at::CPUGeneratorImpl>(seed);
    auto made =
        lora::make_adapters(lora::with_rank(lora::default_targets(config_), rank, 2), seed, form);
    for (lora::Module& module : made.modules) {
      at::Tensor& last = module.up.defined() ? module.up : module.down;
      last = at::randn(last.sizes(), gen).mul_(0.2);
      if (module.magnitude.defined())
        module.magnitude = at::rand(module.magnitude.sizes(), gen).add_(0.5);
    }
    return made;
  }

  static double difference(const at::Tensor& a, const at::Tensor& b) {
    return ((a - b).norm() / b.norm()).item<double>();
  }

  dit::Config config_ = small_config();
  std::filesystem::path folder_;
};

TEST_F(SamplerTest, FollowsTheVelocityOfTheWholeModel) {
  const auto inputs = pictures(2);
  const auto found = sample({.compute = at::kFloat}, inputs);
  for (size_t i = 0; i < inputs.size(); ++i)
    EXPECT_LT(difference(found[i], by_hand(weights(), inputs[i], 1)), 1e-5) << i;
  EXPECT_GT(difference(found[0], found[1]), 0.1);
}

TEST_F(SamplerTest, LeadsAwayFromTheNegativePrompt) {
  const auto inputs = pictures(1, /*negative=*/true);
  const auto found = sample({.compute = at::kFloat}, inputs, {}, 3.0);
  EXPECT_LT(difference(found[0], by_hand(weights(), inputs[0], 3.0)), 1e-5);
  EXPECT_GT(difference(found[0], by_hand(weights(), pictures(1)[0], 1)), 1e-2);
}

TEST_F(SamplerTest, BitsDependOnNothingBesideThePicture) {
  const auto inputs = pictures(3);
  for (const auto compute : {at::kFloat, at::kBFloat16}) {
    const auto together = sample({.compute = compute}, inputs);
    for (const int64_t resident : {0, 2, 4})
      for (const auto from : {StreamFrom::kFile, StreamFrom::kHost}) {
        const auto streamed = sample(
            {.compute = compute, .resident_blocks = resident, .lookahead = 2, .stream_from = from},
            inputs);
        for (size_t i = 0; i < inputs.size(); ++i)
          EXPECT_TRUE(at::equal(streamed[i], together[i])) << resident << " " << i;
      }
    for (size_t i = 0; i < inputs.size(); ++i)
      EXPECT_TRUE(at::equal(sample({.compute = compute}, std::span(&inputs[i], 1))[0], together[i]))
          << i;
  }
}

TEST_F(SamplerTest, AdaptersAreAddedWithTheirWeights) {
  const auto inputs = pictures(1);
  const std::vector<WeightedAdapters> several{{adapters(1), 0.7}, {adapters(2), -0.4}};
  dit::Weights merged = weights();
  for (const auto& [of_file, weight] : several) lora::merge(of_file, merged, weight);
  for (const int64_t resident : {-1, 1}) {
    const auto found =
        sample({.compute = at::kFloat, .resident_blocks = resident}, inputs, several);
    EXPECT_LT(difference(found[0], by_hand(merged, inputs[0], 1)), 1e-5) << resident;
  }
  EXPECT_GT(difference(by_hand(merged, inputs[0], 1), by_hand(weights(), inputs[0], 1)), 1e-2);
}

TEST_F(SamplerTest, AdaptersOfAnyFormAreAdded) {
  const auto inputs = pictures(1);
  const lora::Form lokr{.algorithm = lora::Algorithm::kLokr, .factor = 4};
  const lora::Form dora{.dora = true};
  const std::vector<WeightedAdapters> several{
      {adapters(1, dora), 0.5}, {adapters(2, lokr), 0.8}, {adapters(3), 1.0}};
  // what each does to the weights alone is added
  const dit::Weights plain = weights();
  dit::Weights merged = weights();
  std::vector<at::Tensor> sums;
  for (const auto& [of_file, weight] : several) {
    dit::Weights alone = weights();
    lora::merge(of_file, alone, weight);
    size_t i = 0;
    dit::Weights base = plain;
    std::vector<at::Tensor> before;
    dit::for_each_linear(base, [&](const std::string&, Linear& l) { before.push_back(l.weight); });
    sums.resize(before.size());
    dit::for_each_linear(alone, [&](const std::string&, Linear& l) {
      const at::Tensor delta = l.weight - before[i];
      sums[i] = sums[i].defined() ? sums[i] + delta : delta;
      ++i;
    });
  }
  size_t i = 0;
  dit::for_each_linear(merged,
                       [&](const std::string&, Linear& l) { l.weight = l.weight + sums[i++]; });
  const auto found = sample({.compute = at::kFloat}, inputs, several);
  EXPECT_LT(difference(found[0], by_hand(merged, inputs[0], 1)), 2e-5);
}

TEST_F(SamplerTest, NoiseIsKeyedBySeedPromptAndIndex) {
  const at::Tensor noise = sample_noise(1, 2, 3, 16, 4, 4);
  EXPECT_TRUE(at::equal(noise, sample_noise(1, 2, 3, 16, 4, 4)));
  for (const auto& other : {sample_noise(2, 2, 3, 16, 4, 4),
                            sample_noise(1, 3, 3, 16, 4, 4),
                            sample_noise(1, 2, 4, 16, 4, 4)})
    EXPECT_FALSE(at::equal(noise, other));
}

TEST_F(SamplerTest, PlanIsWhatSamplingTakes) {
  SampleShape shape{.batch = 2, .width = 96, .height = 128, .text_length = 24, .negative = true};
  shape.text_type = at::kFloat;
  for (const int64_t resident : {-1, 0, 3}) {
    const SamplerOptions options{.compute = at::kFloat, .resident_blocks = resident};
    const std::vector<WeightedAdapters> some{{adapters(1), 0.5}, {adapters(2), 1.0}};
    std::vector<WeightedAdapters> sizes = some;
    for (auto& of_file : sizes)
      for (lora::Module& module : of_file.adapters.modules)
        for (at::Tensor* part : module.parts())
          if (part->defined()) *part = part->to(at::kMeta);
    const auto model = file(options);
    const MemoryPlan plan = plan_sampling(config_, model.get(), options, sizes, shape);
    const int64_t before = cpu_memory().live;
    reset_cpu_peak();
    {
      std::vector<SampleInputs> inputs;
      for (int64_t i = 0; i < shape.batch; ++i) {
        const MemoryScope scope(MemoryCause::kData);
        const auto values = [](at::IntArrayRef sizes_) { return at::full(sizes_, 0.1); };
        inputs.push_back(
            {.noise = values({1, config_.in_channels / 4, shape.height / 8, shape.width / 8}),
             .prompt_embedding = values({1, shape.text_length, config_.prompt_dim}),
             .pooled_embedding = values({1, config_.pooled_dim}),
             .negative_embedding = values({1, shape.text_length, config_.prompt_dim}),
             .negative_pooled = values({1, config_.pooled_dim})});
      }
      Sampler sampler(config_, model, options, some);
      euler_sample([&](std::span<const dit::Inputs> in) { return sampler(in); }, euler(2), inputs);
    }
    const int64_t measured = cpu_memory().peak - before;
    EXPECT_NEAR(static_cast<double>(measured),
                static_cast<double>(plan.device_bytes()),
                // staging of a small model is much beside it
                std::max(0.03 * static_cast<double>(plan.device_bytes()), 262144.0))
        << resident;
  }
}

TEST_F(SamplerTest, PlanOfATrainingHoldsItsPictures) {
  StepShape shape;
  shape.width = shape.height = 64;
  shape.text_length = 8;
  shape.text_type = at::kFloat;
  const SampleShape picture{
      .batch = 2, .width = 768, .height = 512, .text_length = 24, .text_type = at::kFloat};
  for (const bool full : {false, true})
    for (const int64_t resident : {-1, 1}) {
      SCOPED_TRACE(testing::Message() << full << " " << resident);
      TrainerOptions o;
      o.compute = at::kFloat;
      o.full = full;
      o.residency.resident_blocks = resident;
      o.scratch = folder_;
      const auto model = std::make_shared<ModelFile>(folder_ / "flux.safetensors",
                                                     ModelFileOptions{.dtype = at::kFloat});
      const int64_t without = plan_memory(config_, model.get(), o, shape).device_bytes();
      StepShape with_pictures = shape;
      with_pictures.sample = picture;
      const int64_t planned = plan_memory(config_, model.get(), o, with_pictures).device_bytes();
      EXPECT_GT(planned, without);
      const int64_t before = cpu_memory().live;
      reset_cpu_peak();
      {
        Trainer trainer(config_, model, o);
        const std::vector<FlowInputs> batches{test::random_batch(config_, shape)};
        for (int64_t step = 1; step <= 2; ++step) {
          trainer.step(batches, step, 1e-3);
          std::vector<SampleInputs> inputs;
          for (int64_t i = 0; i < picture.batch; ++i) {
            const MemoryScope scope(MemoryCause::kData);
            const auto values = [](at::IntArrayRef sizes) { return at::full(sizes, 0.1); };
            inputs.push_back(
                {.noise =
                     values({1, config_.in_channels / 4, picture.height / 8, picture.width / 8}),
                 .prompt_embedding = values({1, picture.text_length, config_.prompt_dim}),
                 .pooled_embedding = values({1, config_.pooled_dim})});
          }
          euler_sample([&](std::span<const dit::Inputs> in) { return trainer.predict(in); },
                       euler(),
                       inputs);
        }
      }
      EXPECT_NEAR(static_cast<double>(cpu_memory().peak - before),
                  static_cast<double>(planned),
                  std::max(0.03 * static_cast<double>(planned), 262144.0));
    }
}

TEST_F(SamplerTest, LookingDoesNotChangeATraining) {
  const auto inputs = pictures(2);
  StepShape shape;
  shape.width = shape.height = 64;
  shape.text_length = 8;
  const auto train = [&](bool look, bool full, OptimizerOptions optimizer, int64_t resident) {
    TrainerOptions o;
    o.compute = at::kFloat;
    o.full = full;
    o.rank = 4;
    o.alpha = 4;
    o.optimizer = optimizer;
    o.residency.resident_blocks = resident;
    o.scratch = folder_;
    Trainer trainer(config_,
                    std::make_shared<ModelFile>(folder_ / "flux.safetensors",
                                                ModelFileOptions{.dtype = at::kFloat}),
                    o);
    at::manual_seed(5);
    std::vector<FlowInputs> batches{test::random_batch(config_, shape)};
    std::vector<at::Tensor> seen;
    for (int64_t step = 1; step <= 3; ++step) {
      trainer.step(batches, step, 1e-2);
      if (look)
        seen = euler_sample(
            [&](std::span<const dit::Inputs> in) { return trainer.predict(in); }, euler(), inputs);
    }
    trainer.flush();
    std::vector<at::Tensor> out;
    trainer.model().for_all_trainables([&](Trainable& t) {
      out.push_back(t.value.detach().clone());
      return false;
    });
    return std::pair(out, seen);
  };
  for (const bool full : {false, true})
    for (const int64_t resident : {-1, 1})
      for (const OptimizerOptions& optimizer :
           {OptimizerOptions(AdamWOptions{}), OptimizerOptions(ScheduleFreeOptions{})}) {
        SCOPED_TRACE(testing::Message() << full << " " << resident << " " << optimizer.index());
        const auto [plain, none] = train(false, full, optimizer, resident);
        const auto [looked, seen] = train(true, full, optimizer, resident);
        ASSERT_EQ(plain.size(), looked.size());
        for (size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(at::equal(plain[i], looked[i])) << i;
        // and it sees what was trained
        EXPECT_GT(difference(seen[0], by_hand(weights(), inputs[0], 1)), 1e-4);
      }
}

}  // namespace
}  // namespace flux::engine
