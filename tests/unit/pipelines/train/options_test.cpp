#include "pipelines/train/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/tool.h"
#include "pipelines/train/time_limit.h"
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
                            {"optimizer-args", ""},
                            {"state-dtype", "f32"},
                            {"rank", 16},
                            {"alpha", 16.0},
                            {"base-precision", "bf16"},
                            {"train-blocks", "all"},
                            {"train-double-blocks", "all"},
                            {"train-single-blocks", "all"},
                            {"module-ranks", ""},
                            {"rank-of", ""},
                            {"lr-of", ""},
                            {"loraplus-lr-ratio", 1.0},
                            {"scale-weight-norms", 0.0},
                            {"network-dropout", 0.0},
                            {"rank-dropout", 0.0},
                            {"module-dropout", 0.0},
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
                            {"model-prediction-type", "raw"},
                            {"masked-loss", "auto"},
                            {"text-mask", "cache"},
                            {"ip-noise-gamma", 0.0},
                            {"min-timestep", 0.0},
                            {"max-timestep", 1000.0},
                            {"stratified-timesteps", false},
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

TEST(TrainOptions, SavesByStepsEpochsOrMinutes) {
  EXPECT_EQ(parse({"--save-every", "500"}).save_every.steps, 500);
  EXPECT_EQ(parse({"--save-every", "0"}).save_every.steps, 0);
  const SaveEvery epochs = parse({"--save-every", "2ep"}).save_every;
  EXPECT_EQ(epochs.epochs, 2);
  EXPECT_EQ(epochs.steps, 0);
  const Options minutes = parse({"--save-every", "30min", "--keep-last", "3"});
  EXPECT_EQ(minutes.save_every.minutes, 30);
  EXPECT_EQ(minutes.keep_last, 3);
  EXPECT_THAT(run_toml(minutes), testing::HasSubstr("save-every = \"30min\"\n"));
  EXPECT_THAT(run_toml(minutes), testing::HasSubstr("keep-last = 3\n"));
  EXPECT_THAT(run_toml(parse({"--save-every", "2ep"})), testing::HasSubstr("\"2ep\""));
  EXPECT_THAT(run_toml(parse({"--save-every", "0.5min"})), testing::HasSubstr("\"0.5min\""));
  for (const char* wrong :
       {"", "ep", "min", "0ep", "0min", "-1", "2.5ep", "2 ep", "30m", "nanmin", "infmin", "1e9"})
    EXPECT_THAT(message_of({"--save-every", wrong}), testing::HasSubstr("neither a number"))
        << wrong;
}

TEST(TrainOptions, ATimeLimitIsATimeAsPeopleAndSlurmWriteIt) {
  EXPECT_EQ(parse({}).time_limit, 0);
  const std::vector<std::pair<const char*, double>> known{{"4h", 14400},
                                                          {"90m", 5400},
                                                          {"90min", 5400},
                                                          {"1h30m", 5400},
                                                          {"1H 30M", 5400},
                                                          {"1.5h", 5400},
                                                          {"2d12h", 216000},
                                                          {"45s", 45},
                                                          {"30sec", 30},
                                                          {"1h5s", 3605},
                                                          {"4 hours", 14400},
                                                          {"1 day 2hrs 3 minutes", 93780},
                                                          {"04:00:00", 14400},
                                                          {"100:00:01", 360001},
                                                          {"30:00", 1800},
                                                          {"1-12", 129600},
                                                          {"1-12:30", 131400},
                                                          {"1-00:00:05", 86405}};
  for (const auto& [text, seconds] : known)
    EXPECT_EQ(parse({"--time-limit", text}).time_limit, seconds) << text;
  EXPECT_EQ(parse({"--time-limit", "UNLIMITED"}).time_limit, 0);
  EXPECT_THAT(run_toml(parse({"--time-limit", "1h30m"})),
              testing::HasSubstr("time-limit = \"5400s\"\n"));
  EXPECT_THAT(run_toml(parse({})), testing::Not(testing::HasSubstr("time-limit")));
  for (const char* wrong : {"",        "30",   "h",       "-1h", "1m1h", "1h1h",    "4x",
                            "1:2:3:4", "1-",   "-5:00",   "1:",  ":30",  "1.5:00",  "1e3s",
                            "nan",     "infs", "4h junk", "1mo", "4 5h", "NOT_SET", "--"})
    EXPECT_THAT(message_of({"--time-limit", wrong}), testing::HasSubstr("is no time such as 4h"))
        << wrong;
  for (const char* wrong : {"0s", "0:00", "00:00:00", "10000d"})
    EXPECT_THAT(message_of({"--time-limit", wrong}), testing::HasSubstr("not above 0")) << wrong;
}

TEST(TimeLimit, KeepsTimeForAStepAndASave) {
  TimeLimit limit(1000, 5'000'000'000);  // the first save is taken for 50 s
  EXPECT_FALSE(limit.ends(929));
  EXPECT_TRUE(limit.ends(931)) << "and 20 s for the end";
  EXPECT_EQ(limit.deadline(), 930);
  limit.step_took(30);
  limit.step_took(10);
  EXPECT_FALSE(limit.ends(899));
  EXPECT_TRUE(limit.ends(901)) << "the longest step counts";
  limit.save_took(100);
  EXPECT_EQ(limit.deadline(), 830) << "and half as long again as the longest save";
  limit.save_took(20);
  EXPECT_FALSE(limit.ends(799));
  EXPECT_TRUE(limit.ends(801));
  EXPECT_THAT(limit.describe(820),
              testing::AllOf(testing::HasSubstr("820.0 s of 1000.0 are over"),
                             testing::HasSubstr("up to 30.0 s"),
                             testing::HasSubstr("save up to 100.0 s")));
  TimeLimit fast(1000, 5'000'000'000);
  fast.save_took(1);
  EXPECT_EQ(fast.deadline(), 978.5) << "what was measured counts, not what was expected";
  EXPECT_EQ(TimeLimit(10, 0).deadline(), 8);
  EXPECT_EQ(TimeLimit(36000, 0).deadline(), 35970);
  EXPECT_FALSE(TimeLimit(0, 5'000'000'000).ends(1e9)) << "no limit";
}

TEST(TrainOptions, ValidatesByStepsEpochsOrMinutesAtNoiseLevels) {
  const Options none = parse({});
  EXPECT_FALSE(none.validate_every.any());
  EXPECT_FALSE(none.no_validation);
  EXPECT_EQ(none.effective_validation_sigmas(), (std::vector<double>{0.1, 0.25, 0.5, 0.75, 0.9}));
  EXPECT_THAT(run_toml(none), testing::Not(testing::HasSubstr("validat")));
  const Options some = parse({"--validate-every",
                              "2ep",
                              "--validation-sigmas",
                              "0.3, 1",
                              "--validation-samples",
                              "4",
                              "--validation-split",
                              "0.1"});
  EXPECT_EQ(some.validate_every.epochs, 2);
  EXPECT_EQ(some.effective_validation_sigmas(), (std::vector<double>{0.3, 1}));
  for (const char* line : {"validate-every = \"2ep\"\n",
                           "validation-sigmas = \"0.3,1\"\n",
                           "validation-samples = 4\n",
                           "validation-split = 0.1\n",
                           "validation-seed = 0\n"})
    EXPECT_THAT(run_toml(some), testing::HasSubstr(line));
  EXPECT_EQ(deciding_options(some)["validation-split"], 0.1);
  EXPECT_FALSE(deciding_options(some).contains("validate-every"));
  const Options off = parse({"--validate-every", "off"});
  EXPECT_TRUE(off.no_validation);
  EXPECT_THAT(run_toml(off), testing::HasSubstr("validate-every = \"off\"\n"));
  EXPECT_THAT(message_of({"--validate-every", "off", "--validation-samples", "4"}),
              testing::HasSubstr("--validation-samples has no effect with --validate-every off"));
  EXPECT_THAT(message_of({"--validate-every", "often"}), testing::HasSubstr("neither a number"));
  for (const char* wrong : {"", "0", "1.1", "x", "0.5,,0.6", "nan"})
    EXPECT_THAT(message_of({"--validation-sigmas", wrong}),
                testing::HasSubstr("is not a noise level"))
        << wrong;
  EXPECT_THAT(message_of({"--validation-sigmas", "0.5,0.50"}),
              testing::HasSubstr("is there twice"));
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
      {{"--huber-scale", "2"}, {"--loss-type", "l2"}},
      {{"--ip-noise-gamma-random-strength"}, {}},
      {{"--lr-decay-steps", "3"}, {"--lr-scheduler", "cosine"}},
      {{"--min-lr-ratio", "0.1"}, {"--lr-scheduler", "constant_with_warmup"}},
      {{"--lr-cycles", "2"}, {"--lr-scheduler", "cosine"}},
      {{"--lr-power", "2"}, {"--lr-scheduler", "linear"}},
      {{"--lr-timescale", "2"}, {"--lr-scheduler", "linear"}},
      {{"--lr-step-rules", "1:2,3"}, {"--lr-scheduler", "linear"}},
      {{"--lr-warmup-steps", "3"}, {"--lr-scheduler", "piecewise_constant"}},
      {{"--lr-warmup-steps", "3"}, {"--lr-scheduler", "constant"}}};
  for (const auto& [flag, setting] : cases) {
    std::vector<std::string> arguments = flag;
    arguments.insert(arguments.end(), setting.begin(), setting.end());
    EXPECT_THAT(message_of(arguments), testing::HasSubstr(flag[0] + " has no effect here"));
  }
  EXPECT_EQ(message_of({"--discrete-flow-shift", "2", "--timestep-sampling", "shift"}), "no error");
  EXPECT_EQ(message_of({"--huber-c", "1", "--loss-type", "huber"}), "no error");
}

TEST(TrainOptions, WeightsOfTheLossNeedNoTable) {
  EXPECT_EQ(message_of({"--weighting-scheme", "cosmap"}), "no error");
  EXPECT_EQ(parse({"--weighting-scheme", "uniform"}).timesteps.weighting, WeightingScheme::kNone);
  EXPECT_EQ(deciding_options(parse({"--weighting-scheme", "sigma_sqrt"}))["weighting-scheme"],
            "sigma_sqrt");
}

TEST(TrainOptions, WarmUpAndDecayAreStepsOrSharesOfTheRun) {
  const auto lr = [](std::vector<std::string> arguments) {
    arguments.insert(arguments.end(),
                     {"--lr-scheduler", "warmup_stable_decay", "--max-steps", "200"});
    arguments.insert(arguments.end(), kNeeded.begin(), kNeeded.end() - 2);
    return parse(arguments, false).effective_lr();
  };
  EXPECT_EQ(lr({"--lr-warmup-steps", "0.05", "--lr-decay-steps", "0.5"}).num_warmup_steps, 10);
  EXPECT_EQ(lr({"--lr-warmup-steps", "0.05", "--lr-decay-steps", "0.5"}).num_decay_steps, 100);
  EXPECT_EQ(lr({"--lr-warmup-steps", "7", "--lr-decay-steps", "3"}).num_warmup_steps, 7);
  for (const char* wrong : {"1.5", "-1", "x", "nan", "1.0", ""})
    EXPECT_THAT(message_of({"--lr-scheduler", "linear", std::string("--lr-warmup-steps=") + wrong}),
                testing::HasSubstr("lr-warmup-steps"))
        << wrong;
}

TEST(TrainOptions, RefusesSchedulesThatCannotBe) {
  EXPECT_THAT(message_of({"--lr-scheduler", "piecewise_constant"}),
              testing::HasSubstr("needs --lr-step-rules"));
  EXPECT_THAT(message_of({"--lr-scheduler", "piecewise_constant", "--lr-step-rules", "1:5"}),
              testing::HasSubstr("--lr-step-rules"));
  EXPECT_THAT(message_of({"--lr-scheduler", "warmup_stable_decay"}),
              testing::HasSubstr("needs --lr-decay-steps"));
  EXPECT_THAT(message_of({"--lr-scheduler",
                          "warmup_stable_decay",
                          "--lr-decay-steps",
                          "4",
                          "--lr-warmup-steps",
                          "2"}),
              testing::HasSubstr("more than --max-steps 5"));
  EXPECT_THAT(message_of({"--lr-scheduler", "polynomial", "--learning-rate", "1e-8"}),
              testing::HasSubstr("polynomial falls to 1e-07"));
  EXPECT_EQ(
      message_of(
          {"--lr-scheduler", "polynomial", "--learning-rate", "1e-8", "--min-lr-ratio", "0.1"}),
      "no error");
  EXPECT_THAT(message_of({"--min-timestep", "600", "--max-timestep", "600"}),
              testing::HasSubstr("--min-timestep 600 is not below"));
}

TEST(TrainOptions, EveryScheduleAndObjectiveSurvivesRunToml) {
  test::TemporaryFolder folder;
  const std::vector<std::vector<std::string>> cases{
      {"--lr-scheduler", "cosine_with_restarts", "--lr-cycles", "3", "--min-lr-ratio", "0.1"},
      {"--lr-scheduler", "polynomial", "--lr-power", "2", "--lr-warmup-steps", "0.2"},
      {"--lr-scheduler", "inverse_sqrt", "--lr-timescale", "9"},
      {"--lr-scheduler", "cosine_with_min_lr", "--min-lr-ratio", "0.1"},
      {"--lr-scheduler", "warmup_stable_decay", "--lr-decay-steps", "2"},
      {"--lr-scheduler", "piecewise_constant", "--lr-step-rules", "1:2,0.1"},
      {"--loss-type", "huber", "--huber-schedule", "snr", "--huber-scale", "2"},
      {"--model-prediction-type", "sigma_scaled", "--weighting-scheme", "cosmap"},
      {"--masked-loss"},
      {"--masked-loss=renormalised", "--text-mask", "off"},
      {"--ip-noise-gamma", "0.1", "--ip-noise-gamma-random-strength"},
      {"--min-timestep", "100", "--max-timestep", "900", "--stratified-timesteps"}};
  for (const auto& arguments : cases) {
    SCOPED_TRACE(arguments[0] + (arguments.size() > 1 ? " " + arguments[1] : ""));
    const Options first = parse(arguments);
    EXPECT_NE(deciding_options(first), deciding_options(parse({})));
    const Options again =
        parse({"--config", folder.write("run.toml", run_toml(first)).string()}, false);
    EXPECT_EQ(deciding_options(first), deciding_options(again));
  }
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
