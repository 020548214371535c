// Full fine-tuning, and runs that stream: where weights are is not seen in what is saved.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/engine/model_file.h"
#include "common/tensor/weight_file.h"
#include "formats/checkpoint/checkpoint.h"
#include "pipelines/train/run.h"
#include "tests/support/training_scene.h"

namespace flux::train {
namespace {

using test::message_of;
using testing::AllOf;
using testing::HasSubstr;

// Four steps in bfloat16.
struct Scene : test::TrainingScene {
  Scene() {
    options.max_steps = 4;
    options.precision = Precision::kBF16;
  }
  std::string saved(const char* name) const {
    return read_file(options.out / "step-000004" / name);
  }
};

void stream(Options& o) {
  o.resident_blocks = 0;
  o.kept_graphs = 0;
  o.block_inputs = engine::InputPlace::kDisk;
}

TEST(TrainMemory, StreamedRunsSaveTheSameBytes) {
  for (const auto method : {Method::kLora, Method::kFull}) {
    for (const auto optimizer : {OptimizerKind::kAdamW8bit, OptimizerKind::kAdafactor}) {
      for (const int64_t accumulation : {1, 3}) {
        Scene all, streamed, adapters;
        for (Scene* scene : {&all, &streamed, &adapters}) {
          scene->options.method = method;
          scene->options.optimizer = optimizer;
          scene->options.gradient_accumulation = accumulation;
        }
        stream(streamed.options);
        run(all.options);
        run(streamed.options);
        const char* weights = method == Method::kFull ? "model.safetensors" : "lora.safetensors";
        EXPECT_TRUE(all.saved(weights) == streamed.saved(weights));
        EXPECT_TRUE(all.saved("state.safetensors") == streamed.saved("state.safetensors"));
        if (method == Method::kFull) {
          Scene states;
          states.options = all.options;
          states.options.out = states.folder / "states";
          states.options.stream_states = true;
          run(states.options);
          EXPECT_TRUE(all.saved(weights) == states.saved(weights));
          EXPECT_TRUE(all.saved("state.safetensors") == states.saved("state.safetensors"));
          continue;
        }
        stream(adapters.options);
        adapters.options.stream_adapters = true;
        run(adapters.options);
        EXPECT_TRUE(all.saved(weights) == adapters.saved(weights));
        EXPECT_TRUE(all.saved("state.safetensors") == adapters.saved("state.safetensors"));
      }
    }
  }
}

TEST(TrainMemory, FullFineTuningResumesBitForBitWhereverItsWeightsAre) {
  for (const auto optimizer :
       {OptimizerKind::kAdamW, OptimizerKind::kAdamW8bit, OptimizerKind::kAdafactor}) {
    Scene straight, halves;
    for (Scene* scene : {&straight, &halves}) {
      scene->options.method = Method::kFull;
      scene->options.optimizer = optimizer;
    }
    run(straight.options);
    halves.options.max_steps = 2;
    stream(halves.options);
    run(halves.options);
    halves.options.max_steps = 4;
    halves.options.resume = true;
    halves.options.resident_blocks = 1;
    halves.options.stream_states = optimizer == OptimizerKind::kAdamW8bit;
    halves.options.block_inputs.reset();
    run(halves.options);
    EXPECT_TRUE(straight.saved("model.safetensors") == halves.saved("model.safetensors"));
    EXPECT_TRUE(straight.saved("state.safetensors") == halves.saved("state.safetensors"));
  }
}

TEST(TrainMemory, StreamedAdaptersResumeBitForBit) {
  Scene straight, halves;
  run(straight.options);
  halves.options.max_steps = 2;
  stream(halves.options);
  halves.options.stream_adapters = true;
  run(halves.options);
  halves.options.max_steps = 4;
  halves.options.resume = true;
  run(halves.options);
  EXPECT_TRUE(straight.saved("lora.safetensors") == halves.saved("lora.safetensors"));
  EXPECT_TRUE(straight.saved("state.safetensors") == halves.saved("state.safetensors"));
}

/// After step t, from the averages after step t - 1 and what the step made.
at::Tensor next_average(const at::Tensor& before, const at::Tensor& weights, int64_t t) {
  const double decay = std::min(0.6, static_cast<double>(t) / static_cast<double>(9 + t));
  return before.defined() ? at::lerp(before, weights.to(at::kDouble), 1 - decay)
                          : weights.to(at::kDouble);
}

TEST(TrainMemory, EveryCheckpointHoldsTheAverageOfTheStepsSoFar) {
  for (const auto method : {Method::kLora, Method::kFull}) {
    Scene scene;
    Options& o = scene.options;
    o.method = method;
    o.precision = Precision::kF32;
    o.lora_dtype = SaveDtype::kF32;
    o.ema_decay = 0.6;
    o.save_every.steps = 1;
    o.lr.learning_rate = 0.02;
    if (method == Method::kLora) o.scale_weight_norms = 0.05;  // acts after the update
    run(o);
    std::map<std::string, at::Tensor> expected;
    for (int64_t t = 1; t <= o.max_steps; ++t) {
      const auto folder = o.out / checkpoint::step_name(t);
      const auto raw = read_weights(
          folder / (method == Method::kFull ? "model.safetensors" : "lora.safetensors"));
      const auto average = read_weights(folder / "ema.safetensors");
      ASSERT_EQ(average.tensors.size(), raw.tensors.size());
      for (const auto& [name, tensor] : raw.tensors) {
        at::Tensor& so_far = expected[name];
        so_far = next_average(so_far, tensor, t);
        const at::Tensor& found = average.tensors.at(name);
        EXPECT_EQ(found.scalar_type(), tensor.scalar_type());
        EXPECT_LT((found - so_far).abs().max().item<double>(), 1e-6) << name << " step " << t;
      }
      auto metadata = average.metadata;
      EXPECT_EQ(metadata.at("flux_stages.ema_decay"), "0.6");
      metadata.erase("flux_stages.ema_decay");
      auto others = raw.metadata;
      for (auto* of_file : {&metadata, &others})
        std::erase_if(*of_file, [](const auto& entry) { return entry.first.starts_with("sshs_"); });
      EXPECT_EQ(metadata, others);
      EXPECT_THAT(metadata.at("flux_stages.run"), HasSubstr("\"ema-decay\":0.6"));
    }
  }
}

TEST(TrainMemory, AveragesAreTheSameWhereverTheyAreAndAfterAResume) {
  for (const auto method : {Method::kLora, Method::kFull}) {
    for (const auto optimizer :
         {OptimizerKind::kAdamW8bit, OptimizerKind::kProdigy, OptimizerKind::kScheduleFree}) {
      Scene plain, all, streamed, halves;
      for (Scene* scene : {&plain, &all, &streamed, &halves}) {
        Options& o = scene->options;
        o.method = method;
        o.optimizer = optimizer;
        o.gradient_accumulation = 2;
        if (scene == &plain) continue;
        o.ema_decay = 0.6;
        o.ema_dtype = optimizer == OptimizerKind::kProdigy ? StateDtype::kF32 : StateDtype::kBF16;
      }
      stream(streamed.options);
      streamed.options.stream_adapters = method == Method::kLora;
      run(plain.options);
      run(all.options);
      run(streamed.options);
      halves.options.max_steps = 2;
      halves.options.stream_states = method == Method::kFull;
      run(halves.options);
      halves.options.resume = true;
      halves.options.max_steps = 4;
      halves.options.stream_states = false;
      stream(halves.options);
      run(halves.options);
      const char* weights = method == Method::kFull ? "model.safetensors" : "lora.safetensors";
      const auto a = read_weights(plain.options.out / "step-000004" / weights),
                 b = read_weights(all.options.out / "step-000004" / weights);
      for (const auto& [name, tensor] : a.tensors)
        EXPECT_TRUE(at::equal(tensor, b.tensors.at(name))) << name;  // it changes nothing
      for (const char* name : {weights, "ema.safetensors", "state.safetensors"}) {
        EXPECT_TRUE(all.saved(name) == streamed.saved(name)) << name;
        EXPECT_TRUE(all.saved(name) == halves.saved(name)) << name;
      }
      EXPECT_FALSE(all.saved(weights) == all.saved("ema.safetensors"));
      halves.options.ema_decay = 0.7;
      EXPECT_THAT(message_of(halves.options), AllOf(HasSubstr("--ema-decay"), HasSubstr("0.6")));
    }
  }
}

TEST(TrainMemory, ASavedModelIsAModelAndMoved) {
  Scene scene;
  scene.options.method = Method::kFull;
  run(scene.options);
  const auto saved = scene.options.out / "step-000004/model.safetensors";
  const engine::ModelFile opened(saved);
  EXPECT_EQ(opened.config(), engine::ModelFile(scene.options.model).config());
  const auto before = read_weights(scene.options.model), after = read_weights(saved);
  int64_t moved = 0;
  for (const auto& [name, tensor] : after.tensors) {
    EXPECT_TRUE(tensor.isfinite().all().item<bool>()) << name;
    moved += !at::equal(tensor.to(at::kFloat), before.tensors.at(name).to(at::kFloat));
  }
  EXPECT_GT(moved, static_cast<int64_t>(after.tensors.size()) * 9 / 10);
  // and can be trained on
  Scene next;
  next.options.model = saved;
  run(next.options);
}

TEST(TrainMemory, QuantisedBasesTrain) {
  for (const auto base : {BasePrecision::kFp8, BasePrecision::kNf4}) {
    Scene plain, quantised;
    quantised.options.base = base;
    const Report a = run(plain.options), b = run(quantised.options);
    EXPECT_TRUE(std::isfinite(*b.loss_last));
    EXPECT_NE(*a.loss_first, *b.loss_first);
    EXPECT_NEAR(*a.loss_first, *b.loss_first, 0.2 * *a.loss_first);
  }
}

TEST(TrainMemory, WhatDoesNotFitIsRefusedBeforeLoading) {
  Scene scene;
  scene.options.host_memory = 1 << 20;
  EXPECT_THAT(message_of(scene.options),
              AllOf(HasSubstr("would take"),
                    HasSubstr("--host-memory may take 1.0 MiB"),
                    HasSubstr("hint:")));
  EXPECT_FALSE(std::filesystem::exists(scene.options.out / "step-000004"));
}

TEST(TrainMemory, AStepThatFailsHalfwaySavesNoHalfUpdatedModel) {
  Scene scene;
  scene.options.method = Method::kFull;
  scene.options.optimizer = OptimizerKind::kAdafactor;
  scene.options.lr.learning_rate = 1e30;
  EXPECT_THAT(message_of(scene.options), HasSubstr("not finite"));
  // what was whole before may be there, never what the failing step left
  for (const int64_t step : checkpoint::steps_in(scene.options.out)) {
    EXPECT_LT(step, 4);
    const auto file = scene.options.out / checkpoint::step_name(step) / "model.safetensors";
    for (const auto& [name, tensor] : read_weights(file).tensors)
      EXPECT_FALSE(tensor.isnan().any().item<bool>()) << step << " " << name;
  }
}

}  // namespace
}  // namespace flux::train
