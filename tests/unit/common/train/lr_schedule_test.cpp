#include "common/train/lr_schedule.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "common/core/file.h"

namespace flux {
namespace {

TEST(LearningRate, EqualsTheReferenceOnEveryRow) {
  const auto rows =
      nlohmann::json::parse(read_file(FLUX_SOURCE_DIR "/tests/golden/optim/schedulers.json"))
          .at("schedulers");
  const std::map<std::string, LrSchedule> names{
      {"constant", LrSchedule::kConstant},
      {"constant_with_warmup", LrSchedule::kConstantWithWarmup},
      {"linear", LrSchedule::kLinear},
      {"cosine", LrSchedule::kCosine},
      {"cosine_with_restarts", LrSchedule::kCosineWithRestarts},
      {"polynomial", LrSchedule::kPolynomial},
      {"inverse_sqrt", LrSchedule::kInverseSqrt},
      {"cosine_with_min_lr", LrSchedule::kCosineWithMinLr},
      {"warmup_stable_decay", LrSchedule::kWarmupStableDecay},
      {"piecewise_constant", LrSchedule::kPiecewiseConstant}};
  ASSERT_GT(rows.size(), 20u);
  for (const auto& row : rows) {
    SCOPED_TRACE(row.value("name", "") + " of " + row.value("library", ""));
    const LrOptions options{
        .schedule = names.at(row.at("name")),
        .learning_rate = row.at("base_lr"),
        .num_steps = row.at("total"),
        .num_warmup_steps = row.value("warmup", int64_t{0}),
        .num_cycles = row.value("num_cycles", 1.0),
        .power = row.value("power", 1.0),
        .lr_end = row.value("lr_end", 1e-7),
        .min_lr_ratio = row.value("min_lr_ratio", row.value("min_lr_rate", 0.0)),
        .num_decay_steps = row.value("decay_steps", int64_t{0}),
        .step_rules = row.value("step_rules", "")};
    int64_t step = 0;
    for (const double wanted : row.at("lr")) {
      EXPECT_NEAR(learning_rate(options, step), wanted, 1e-12 * 1e-4 + 1e-12 * wanted)
          << "step " << step;
      ++step;
    }
  }
}

TEST(LearningRate, FallsToTheSmallestRateAsked) {  // formulas in double
  using enum LrSchedule;
  for (const LrSchedule schedule :
       {kLinear, kCosine, kCosineWithRestarts, kCosineWithMinLr, kInverseSqrt}) {
    LrOptions options{.schedule = schedule,
                      .learning_rate = 2e-3,
                      .num_steps = 100,
                      .num_warmup_steps = 10,
                      .num_cycles = 2};
    LrOptions floored = options;
    floored.min_lr_ratio = 0.25;
    for (int64_t step = 0; step <= 100; ++step) {
      const double plain = learning_rate(options, step);
      const double wanted = step < 10                  ? plain
                            : schedule == kInverseSqrt ? std::max(0.5e-3, plain)
                                                       : plain * 0.75 + 0.5e-3;
      EXPECT_NEAR(learning_rate(floored, step), wanted, 1e-15)
          << static_cast<int>(schedule) << " step " << step;
    }
  }
}

TEST(LearningRate, InverseSqrtTakesATimeScale) {
  const LrOptions options{.schedule = LrSchedule::kInverseSqrt,
                          .learning_rate = 1e-3,
                          .num_warmup_steps = 10,
                          .num_timescale_steps = 40};
  for (const int64_t step : {10, 11, 50, 1000})
    EXPECT_NEAR(learning_rate(options, step),
                1e-3 / std::sqrt((static_cast<double>(step) + 30) / 40),
                1e-15);
  LrOptions bare{.schedule = LrSchedule::kInverseSqrt, .learning_rate = 1e-3};
  EXPECT_NEAR(learning_rate(bare, 10000), 1e-3 / std::sqrt(2), 1e-15);
}

TEST(LearningRate, RefusesStepRulesItCannotRead) {
  EXPECT_NO_THROW(check_step_rules("1:10,0.1:20,0.005"));
  for (const char* rules : {"", "1:x,0.1", "1:10", "a", "1:10:20,0.1", "1:10,0.1:20,x"}) {
    EXPECT_THROW(check_step_rules(rules), std::invalid_argument) << rules;
  }
  for (const char* rules : {"", "1:x,0.1", "1:10", "a"}) {
    EXPECT_THROW(
        learning_rate({.schedule = LrSchedule::kPiecewiseConstant, .step_rules = rules}, 20),
        std::invalid_argument)
        << rules;
  }
}

}  // namespace
}  // namespace flux
