#include "common/train/lr_schedule.h"

#include <gtest/gtest.h>

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

TEST(LearningRate, RefusesStepRulesItCannotRead) {
  for (const char* rules : {"", "1:x,0.1", "1:10", "a"}) {
    EXPECT_THROW(
        learning_rate({.schedule = LrSchedule::kPiecewiseConstant, .step_rules = rules}, 20),
        std::invalid_argument)
        << rules;
  }
}

}  // namespace
}  // namespace flux
