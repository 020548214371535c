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

TEST(TrainOptions, RefusesWhatIsNotThereYetAndContradictions) {
  EXPECT_THAT(message_of({"--method", "full"}),
              testing::HasSubstr("--method full is not there yet"));
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
