// The loss of held-out samples: what it is, that training does not feel it, and which checkpoint it marks.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "common/core/file.h"
#include "common/core/text.h"
#include "common/data/training_data.h"
#include "common/models/flux/load.h"
#include "common/models/flux/transformer.h"
#include "common/train/flow_loss.h"
#include "formats/cache/index.h"
#include "formats/checkpoint/checkpoint.h"
#include "pipelines/train/run.h"
#include "pipelines/train/validation.h"
#include "tests/support/training_scene.h"

namespace flux::train {
namespace {

using test::message_of;
using testing::AllOf;
using testing::HasSubstr;

/// Six items, three of them held out; four steps.
struct Scene : test::TrainingScene {
  static test::TrainingCaches caches(bool spoilt) {
    test::TrainingCaches out = test::small_caches();
    out.items = {
        {"a.png", 4, 4},
        {"b.png", 4, 6},
        {"c.png", 4, 4},
        {.name = "x.png", .rows = 4, .columns = 4, .flags = cache::kItemValidation},
        {.name = "y.png", .rows = 4, .columns = 8, .flags = cache::kItemValidation, .masked = true},
        {.name = "z.png",
         .rows = 4,
         .columns = 4,
         .flags = cache::kItemValidation,
         .num_captions = 2,
         .spoilt = spoilt}};
    return out;
  }
  explicit Scene(bool spoilt = false) : TrainingScene(caches(spoilt)) {
    options.max_steps = 4;
    options.validate_every.steps = 1;
    options.batch_size = 2;
  }
  std::string saved(const char* name, int64_t step = 4) const {
    return read_file(options.out / checkpoint::step_name(step) / name);
  }
  std::vector<nlohmann::json> lines() const {
    std::vector<nlohmann::json> out;
    for (const std::string& line : split(read_file(options.out / "metrics.jsonl"), '\n'))
      if (!line.empty()) out.push_back(nlohmann::json::parse(line));
    return out;
  }
  /// What was computed at each step, without the time that it took.
  std::vector<nlohmann::json> validations() const {
    std::vector<nlohmann::json> out;
    for (const auto& line : lines()) {
      if (!line.contains("validation")) continue;
      out.push_back(line["validation"]);
      out.back().erase("seconds");
    }
    return out;
  }
};

void stream(Options& o) {
  o.resident_blocks = 0;
  o.kept_graphs = 0;
}

TEST(Validation, IsTheMeanLossOfHeldOutSamplesAtFixedNoiseLevels) {
  Scene scene;
  scene.options.lr.learning_rate = 0;
  scene.options.max_steps = 1;
  scene.options.validation_sigmas = {0.3, 1};
  // what training alone has
  scene.options.timesteps.weighting = WeightingScheme::kCosmap;
  scene.options.ip_noise_gamma = 0.3;
  run(scene.options);
  const auto found = scene.validations();
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0]["samples"], 3);
  EXPECT_EQ(found[0]["step"], 1);

  const dit::Model model = dit::load_model(scene.options.model, at::kFloat);
  const TrainingData data(scene.options.latents, scene.options.text, {.batch_size = 2});
  for (size_t sigma = 0; sigma < 2; ++sigma) {
    double sum = 0;
    for (int64_t i = 0; i < data.num_held_out_batches(); ++i) {
      const Batch batch = data.load_held_out(i);
      const FlowStep step =
          flow_step(model.config,
                    {.latents = batch.latents,
                     .noise = data.held_out_noise(batch, static_cast<int64_t>(sigma)),
                     .sigma = at::full({batch.size()}, scene.options.validation_sigmas[sigma]),
                     .prompt_embedding = batch.prompt_embedding,
                     .pooled_embedding = batch.pooled_embedding,
                     .loss_mask = batch.loss_mask});
      sum += flow_losses({}, step, dit::forward(model.config, model.weights, step.inputs))
                 .sum()
                 .item<double>();
    }
    EXPECT_NEAR(found[0]["losses"][sigma].get<double>(), sum / 3, 1e-5 * sum);
  }
  EXPECT_NEAR(found[0]["loss"].get<double>(),
              (found[0]["losses"][0].get<double>() + found[0]["losses"][1].get<double>()) / 2,
              1e-12);
}

TEST(Validation, ChangesNoBitOfTheTraining) {
  for (const bool full : {false, true})
    for (const auto kind : {OptimizerKind::kAdamW, OptimizerKind::kScheduleFree})
      for (const bool streams : {false, true}) {
        SCOPED_TRACE(testing::Message() << full << static_cast<int>(kind) << streams);
        Scene with, without;
        for (Scene* scene : {&with, &without}) {
          Options& o = scene->options;
          o.method = full ? Method::kFull : Method::kLora;
          o.precision = Precision::kBF16;
          o.optimizer = kind;
          o.gradient_accumulation = 2;
          if (!full) o.network_dropout = 0.3;
          if (streams) stream(o);
          o.stream_adapters = streams && !full;
          o.save_every.steps = 2;
        }
        without.options.validate_every = {};
        without.options.no_validation = true;
        run(with.options);
        run(without.options);
        EXPECT_EQ(with.validations().size(), 4u);
        EXPECT_TRUE(without.validations().empty());
        for (const int64_t step : {2, 4})
          for (const char* name :
               {full ? "model.safetensors" : "lora.safetensors", "state.safetensors"})
            EXPECT_TRUE(with.saved(name, step) == without.saved(name, step)) << name << step;
      }
}

TEST(Validation, IsTheSameWhereverTheWeightsAreAndAfterAResume) {
  for (const bool full : {false, true}) {
    Scene all, streamed, halves;
    for (Scene* scene : {&all, &streamed, &halves}) {
      scene->options.method = full ? Method::kFull : Method::kLora;
      scene->options.optimizer = OptimizerKind::kScheduleFree;
      scene->options.save_every.steps = 2;
    }
    stream(streamed.options);
    streamed.options.stream_adapters = !full;
    streamed.options.reader_threads = 4;
    run(all.options);
    run(streamed.options);
    EXPECT_EQ(all.validations(), streamed.validations());
    halves.options.max_steps = 2;
    run(halves.options);
    halves.options.max_steps = 4;
    halves.options.resume = true;
    const Report resumed = run(halves.options);
    EXPECT_EQ(all.validations(), halves.validations());
    const auto best = [](const Scene& scene) {
      auto record = nlohmann::json::parse(read_file(scene.options.out / "best.json"));
      record.erase("seconds");
      return record;
    };
    EXPECT_EQ(best(all), best(halves));
    EXPECT_EQ(resumed.best_step, best(all)["step"].get<int64_t>());
    // the losses move with the weights
    const auto losses = all.validations();
    ASSERT_EQ(losses.size(), 4u);
    EXPECT_NE(losses[0]["loss"], losses[3]["loss"]);
  }
}

TEST(Validation, ComesWithEveryCheckpointAndMarksTheBestWhichStays) {
  Scene scene;
  Options& o = scene.options;
  o.validate_every = {};
  o.save_every.steps = 1;
  o.keep_last = 1;
  o.max_steps = 3;
  // nothing changes in step 1, and what comes then is far off
  o.method = Method::kFull;
  o.lr.schedule = LrSchedule::kConstantWithWarmup;
  o.lr_warmup.steps = 1;
  o.lr.learning_rate = 0.1;
  const Report first = run(o);
  const auto found = scene.validations();
  ASSERT_EQ(found.size(), 3u);
  ASSERT_LT(found[0]["loss"], found[1]["loss"]);
  ASSERT_LT(found[0]["loss"], found[2]["loss"]);
  const auto check_mark = [&] {
    const auto record = nlohmann::json::parse(read_file(o.out / "best.json"));
    EXPECT_EQ(record["checkpoint"], "step-000001");
    EXPECT_EQ(record["loss"], found[0]["loss"]);
    EXPECT_EQ(std::filesystem::read_symlink(o.out / "best"), "step-000001");
    EXPECT_TRUE(std::filesystem::exists(o.out / "best/model.safetensors"));
  };
  check_mark();
  EXPECT_EQ(checkpoint::steps_in(o.out), (std::vector<int64_t>{1, 3}));
  EXPECT_EQ(first.best_step, 1);
  EXPECT_EQ(first.best_loss, found[0]["loss"].get<double>());
  EXPECT_EQ(first.validation_loss, found[2]["loss"].get<double>());
  EXPECT_THAT(first.line(), HasSubstr("best_step=1"));
  EXPECT_THAT(read_file(o.out / "report.html"),
              AllOf(HasSubstr("best checkpoint"), HasSubstr("data-curve=\"validation_loss\"")));
  std::string events;
  for (const auto& entry : std::filesystem::directory_iterator(o.out / "tensorboard"))
    events += read_file(entry.path());
  EXPECT_THAT(events, AllOf(HasSubstr("validation/loss"), HasSubstr("validation/sigma_0.25")));
  // a resumed run knows it, without its record too
  std::filesystem::remove(o.out / "best.json");
  std::filesystem::remove(o.out / "best");
  o.resume = true;
  o.max_steps = 5;
  run(o);
  check_mark();
  EXPECT_EQ(checkpoint::steps_in(o.out), (std::vector<int64_t>{1, 3, 5}));
  // losses of other noise levels are another series
  o.max_steps = 6;
  o.validation_sigmas = {0.5};
  EXPECT_EQ(run(o).best_step, 6);
}

TEST(Validation, BestOfEqualOnesIsTheFirstUpToTheResumedStep) {
  test::TemporaryFolder folder;
  const auto add = [&](int64_t step, double loss, int64_t samples = 3) {
    checkpoint::Writer writer(folder.path(), step);
    const Validation v{
        .step = step, .loss = loss, .sigmas = {0.5}, .losses = {loss}, .samples = samples};
    writer.commit({{"validation", v.object()}});
  };
  EXPECT_FALSE(best_checkpoint(folder.path(), 100));
  add(10, 0.1, 2);
  add(20, 0.5);
  add(30, 0.5);
  add(40, 0.7);
  add(50, 0.3);
  EXPECT_EQ(best_checkpoint(folder.path(), 49)->step, 20);
  EXPECT_EQ(best_checkpoint(folder.path(), 50)->step, 50);
  EXPECT_EQ(best_checkpoint(folder.path(), 10)->step, 10);
  EXPECT_FALSE(best_checkpoint(folder.path(), 9));
}

TEST(Validation, SamplesThatAreNotFiniteAreNamedAndTheStepIsSaved) {
  Scene scene(/*spoilt=*/true);
  EXPECT_THAT(
      message_of(scene.options),
      AllOf(HasSubstr("step 1: the validation loss is not finite, on z.png"), HasSubstr("hint:")));
  EXPECT_EQ(checkpoint::steps_in(scene.options.out), (std::vector<int64_t>{1}));
  EXPECT_EQ(scene.lines().size(), 1u);
}

TEST(Validation, NeedsSamplesThatAreHeldOutOnce) {
  test::TrainingScene plain;
  plain.options.validate_every.steps = 1;
  EXPECT_THAT(message_of(plain.options),
              AllOf(HasSubstr("--validate-every has no effect: no samples are held out"),
                    HasSubstr("--validation-split")));
  plain.options.validate_every = {};
  plain.options.validation_samples = 3;
  EXPECT_THAT(message_of(plain.options), HasSubstr("--validation-samples has no effect"));
  Scene twice;
  twice.options.validation_split = 0.5;
  EXPECT_THAT(message_of(twice.options),
              AllOf(HasSubstr("--validation-split has no effect"), HasSubstr("3 items already")));
}

}  // namespace
}  // namespace flux::train
