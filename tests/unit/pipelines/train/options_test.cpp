#include "pipelines/train/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/tool.h"
#include "tests/support/temporary_folder.h"

namespace flux::train {
namespace {

const std::vector<std::string> kNeeded{
    "--latents", "l", "--text", "t", "--model", "m", "--out", "o", "--max-steps", "5"};

Options parse(std::vector<std::string> arguments, bool with_needed = true) {
  if (with_needed) arguments.insert(arguments.end(), kNeeded.begin(), kNeeded.end());
  Tool tool("flux-train", arguments);
  Options options;
  add_flags(options, tool);
  tool.parse();
  check(options, tool);
  return options;
}

std::string message_of(const std::vector<std::string>& arguments, bool with_needed = true) {
  try {
    parse(arguments, with_needed);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "no error";
}

TEST(TrainOptions, DefaultsTrainFluxProperly) {
  const Options options = parse({});
  const nlohmann::json deciding = deciding_options(options);
  EXPECT_EQ(deciding,
            (nlohmann::json{{"method", "lora"},
                            {"rank", 16},
                            {"alpha", 16.0},
                            {"base-precision", "bf16"},
                            {"optimizer", "adamw"},
                            {"clip", "global"},
                            {"gradient-accumulation", 1},
                            {"learning-rate", 1e-4},
                            {"lr-scheduler", "constant"},
                            {"weight-decay", 0.01},
                            {"max-grad-norm", 1.0},
                            {"batch-size", 0},
                            {"seed", 0},
                            {"guidance", 1.0},
                            {"timestep-sampling", "flux_shift"},
                            {"sigmoid-scale", 1.0},
                            {"loss-type", "l2"},
                            {"posterior", "sample"},
                            {"prior-loss-weight", 1.0}}));
  EXPECT_EQ(options.guidance, std::nullopt);
  EXPECT_EQ(options.loss.prediction, Prediction::kRaw);
}

TEST(TrainOptions, AlphaIsTheRankUnlessGiven) {
  EXPECT_EQ(parse({"--rank", "4"}).effective_alpha(), 4);
  EXPECT_EQ(parse({"--rank", "4", "--alpha", "1.5"}).effective_alpha(), 1.5);
}

TEST(TrainOptions, NamesWhatIsMissing) {
  std::vector<std::string> arguments;
  for (const char* flag : {"latents", "text", "model", "out", "max-steps"}) {
    EXPECT_THAT(message_of(arguments, false),
                testing::HasSubstr(std::string("--") + flag + " is missing"));
    arguments.insert(arguments.end(), {std::string("--") + flag, "5"});
  }
  EXPECT_EQ(message_of(arguments, false), "no error");
}

TEST(TrainOptions, AdafactorClipsItself) {
  EXPECT_EQ(parse({}).effective_clip(), engine::ClipMode::kGlobal);
  EXPECT_EQ(parse({"--max-grad-norm", "0"}).effective_clip(), engine::ClipMode::kNone);
  const Options adafactor = parse({"--optimizer", "adafactor"});
  EXPECT_EQ(adafactor.effective_clip(), engine::ClipMode::kNone);
  EXPECT_EQ(adafactor.effective_weight_decay(), 0);
  EXPECT_EQ(parse({"--optimizer", "adafactor", "--clip", "global"}).effective_clip(),
            engine::ClipMode::kGlobal);
}

TEST(TrainOptions, PlanNeedsModelMethodAndResolutionOnly) {
  const Options plan = parse({"--plan", "--method", "lora", "--resolution", "640x512"});
  EXPECT_EQ(plan.plan, PlanOutput::kTable);
  EXPECT_EQ(plan.plan_width, 640);
  EXPECT_EQ(plan.plan_height, 512);
  EXPECT_EQ(parse({"--plan=json", "--method", "full", "--resolution", "512"}).plan,
            PlanOutput::kJson);
  EXPECT_THAT(message_of({"--plan=xml"}), testing::HasSubstr("'xml' is not one of table|json"));
  EXPECT_THAT(message_of({"--plan"}), testing::HasSubstr("--method is missing"));
  EXPECT_THAT(message_of({"--plan", "--method", "lora"}),
              testing::HasSubstr("--resolution is missing"));
  EXPECT_EQ(message_of({"--plan", "--method", "lora", "--resolution", "512"}), "no error");
  for (const char* wrong : {"500x512", "0x16", "512x", "x", "16x16x16", "a"})
    EXPECT_THAT(message_of({"--plan", "--resolution", wrong}), testing::HasSubstr(wrong));
}

TEST(TrainOptions, RefusesContradictions) {
  EXPECT_EQ(message_of({"--method", "full"}), "no error");
  EXPECT_THAT(message_of({"--method", "full", "--rank", "4"}),
              testing::HasSubstr("--rank has no effect with --method full"));
  EXPECT_THAT(message_of({"--method", "full", "--base-precision", "fp8"}),
              testing::HasSubstr("--base-precision has no effect with --method full"));
  EXPECT_THAT(message_of({"--resolution", "512x512"}), testing::HasSubstr("without --plan"));
  EXPECT_THAT(message_of({"--clip", "none", "--max-grad-norm", "2"}),
              testing::HasSubstr("--max-grad-norm has no effect"));
  EXPECT_THAT(message_of({"--clip", "global", "--max-grad-norm", "0"}),
              testing::HasSubstr("contradicts"));
  EXPECT_THAT(message_of({"--host-memory", "lots"}), testing::HasSubstr("'lots' is not a size"));
  EXPECT_THAT(message_of({"--resume", "--replace"}), testing::HasSubstr("contradict"));
}

TEST(TrainOptions, RefusesFlagsThatCannotTakeEffect) {
  const std::vector<std::pair<std::vector<std::string>, std::vector<std::string>>> cases{
      {{"--sigmoid-scale", "2"}, {"--timestep-sampling", "uniform"}},
      {{"--discrete-flow-shift", "2"}, {"--timestep-sampling", "flux_shift"}},
      {{"--weighting-scheme", "mode"}, {"--timestep-sampling", "shift"}},
      {{"--logit-mean", "1"}, {"--timestep-sampling", "sigma"}},
      {{"--logit-std", "1"}, {"--timestep-sampling", "sigma"}},
      {{"--mode-scale", "1"}, {"--timestep-sampling", "sigma"}},
      {{"--huber-c", "1"}, {"--loss-type", "l1"}},
      {{"--huber-schedule", "constant"}, {"--loss-type", "l2"}},
      {{"--lr-warmup-steps", "3"}, {"--lr-scheduler", "constant"}}};
  for (const auto& [flag, setting] : cases) {
    std::vector<std::string> arguments = flag;
    arguments.insert(arguments.end(), setting.begin(), setting.end());
    EXPECT_THAT(message_of(arguments), testing::HasSubstr(flag[0] + " has no effect here"));
  }
  EXPECT_EQ(message_of({"--discrete-flow-shift", "2", "--timestep-sampling", "shift"}), "no error");
  EXPECT_EQ(message_of({"--huber-c", "1", "--loss-type", "huber"}), "no error");
}

TEST(TrainOptions, RunTomlGivesTheSameOptionsAgain) {
  const Options first = parse({"--timestep-sampling",
                               "sigma",
                               "--weighting-scheme",
                               "logit_normal",
                               "--logit-mean",
                               "0.25",
                               "--learning-rate",
                               "1e-5",
                               "--lr-scheduler",
                               "cosine",
                               "--lr-warmup-steps",
                               "7",
                               "--guidance",
                               "3.5",
                               "--loss-type",
                               "huber",
                               "--seed",
                               "9"});
  test::TemporaryFolder folder;
  const Options again =
      parse({"--config", folder.write("run.toml", run_toml(first)).string()}, false);
  EXPECT_EQ(deciding_options(first), deciding_options(again));
  EXPECT_EQ(run_toml(first), run_toml(again));
  EXPECT_EQ(again.latents, "l");
  EXPECT_EQ(again.max_steps, 5);
}

}  // namespace
}  // namespace flux::train
