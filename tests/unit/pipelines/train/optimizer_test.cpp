// Every optimizer of the flags, through whole runs.
#include "pipelines/train/optimizer.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <set>
#include <string>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/tensor/weight_file.h"
#include "pipelines/train/run.h"
#include "tests/support/training_scene.h"

namespace flux::train {
namespace {

using testing::AllOf;
using testing::HasSubstr;

struct Scene : test::TrainingScene {
  Scene(Method method, OptimizerKind optimizer) {
    options.method = method;
    options.optimizer = optimizer;
    options.max_steps = 4;
    options.precision = Precision::kBF16;
    options.lr.learning_rate = optimizer == OptimizerKind::kProdigy ? 1 : 1e-3;
  }
  std::string saved(const char* name) const {
    return read_file(options.out / "step-000004" / name);
  }
  /// Without the header, whose metadata names the options as they were given.
  std::string weights() const {
    const std::string file =
        saved(options.method == Method::kFull ? "model.safetensors" : "lora.safetensors");
    uint64_t header = 0;
    std::memcpy(&header, file.data(), sizeof(header));
    return file.substr(sizeof(header) + header);
  }
};

constexpr OptimizerKind kAll[] = {OptimizerKind::kAdamW,
                                  OptimizerKind::kAdamW8bit,
                                  OptimizerKind::kAdafactor,
                                  OptimizerKind::kLion,
                                  OptimizerKind::kProdigy,
                                  OptimizerKind::kScheduleFree,
                                  OptimizerKind::kSgd};

TEST(Optimizers, GiveOtherWeightsEach) {
  for (const auto method : {Method::kLora, Method::kFull}) {
    std::set<std::string> seen;
    for (const auto kind : kAll) {
      Scene scene(method, kind);
      run(scene.options);
      seen.insert(scene.weights());
    }
    // adapters of fewer than 4,096 elements have float32 states with AdamW8bit too: those of AdamW
    EXPECT_EQ(seen.size(), std::size(kAll) - (method == Method::kLora ? 1 : 0));
  }
}

TEST(Optimizers, ResumeBitForBitWhereverWeightsAre) {
  for (const auto method : {Method::kLora, Method::kFull}) {
    for (const auto kind : {OptimizerKind::kLion,
                            OptimizerKind::kProdigy,
                            OptimizerKind::kScheduleFree,
                            OptimizerKind::kSgd}) {
      SCOPED_TRACE(::testing::Message() << optimizer_title(kind) << (method == Method::kFull));
      Scene straight(method, kind), halves(method, kind);
      run(straight.options);
      halves.options.max_steps = 2;
      halves.options.resident_blocks = 0;
      halves.options.stream_adapters = method == Method::kLora;
      run(halves.options);
      halves.options.max_steps = 4;
      halves.options.resume = true;
      halves.options.resident_blocks = 1;
      run(halves.options);
      EXPECT_TRUE(straight.weights() == halves.weights());
      EXPECT_TRUE(straight.saved("state.safetensors") == halves.saved("state.safetensors"));
    }
  }
}

TEST(Optimizers, ScheduleFreeSavesTheAverageAndResumesFromTheWeights) {
  Scene scene(Method::kFull, OptimizerKind::kScheduleFree);
  run(scene.options);
  const auto model = read_weights(scene.options.out / "step-000004/model.safetensors"),
             state = read_weights(scene.options.out / "step-000004/state.safetensors");
  int64_t others = 0;
  for (const auto& [name, tensor] : model.tensors)
    others += !at::equal(tensor, state.tensors.at("weight." + name));
  EXPECT_GT(others, static_cast<int64_t>(model.tensors.size()) / 2);
}

TEST(Optimizers, StatesWeightModesAndArgumentsHaveAnEffect) {
  const auto weights = [](auto&& change) {
    Scene scene(Method::kFull, OptimizerKind::kAdamW);
    change(scene.options);
    run(scene.options);
    return scene.weights();
  };
  const std::string plain = weights([](Options&) {});
  EXPECT_TRUE(plain == weights([](Options& o) { o.optimizer_args = "beta1=0.9, eps=1e-8"; }));
  EXPECT_FALSE(plain == weights([](Options& o) { o.optimizer_args = "beta2=0.9"; }));
  EXPECT_FALSE(plain == weights([](Options& o) { o.state_dtype = StateDtype::kBF16; }));
  std::set<std::string> modes{plain};
  for (const auto mode : {WeightMode::kNearest, WeightMode::kKahan, WeightMode::kMaster})
    modes.insert(weights([&](Options& o) { o.weight_mode = mode; }));
  EXPECT_GE(modes.size(), 3u);  // kahan and master may agree after four steps
}

TEST(Optimizers, RefuseArgumentsTheyDoNotHave) {
  const auto message = [](const char* arguments) -> std::string {
    Options options;
    options.optimizer = OptimizerKind::kLion;
    options.optimizer_args = arguments;
    try {
      optimizer_options(options);
    } catch (const UsageError& error) {
      return std::string(error.what());
    }
    return "accepted";
  };
  EXPECT_EQ(message("beta1=0.8"), "accepted");
  EXPECT_THAT(message("eps=1"), HasSubstr("the optimizer has no 'eps'"));
  EXPECT_THAT(message("beta1=x"), HasSubstr("'x' is not a number"));
  EXPECT_THAT(message("beta1"), HasSubstr("is not NAME=VALUE"));
}

}  // namespace
}  // namespace flux::train
