// Full fine-tuning, and runs that stream: where weights are is not seen in what is saved.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

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
