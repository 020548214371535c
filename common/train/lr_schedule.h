// common/train/lr_schedule.h - the learning rate of each step.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace flux {

/// Names and formulas of transformers.get_scheduler and diffusers.get_scheduler, which sd-scripts
/// uses. As there, the time scale of inverse_sqrt is the warm-up unless given (10000 steps without one), and
/// cosine is half a wave whatever num_cycles says. min_lr_ratio, which there is of two schedules only, is of all that
/// fall by a formula here.
enum class LrSchedule {
  kConstant,
  kConstantWithWarmup,
  kLinear,
  kCosine,
  kCosineWithRestarts,
  kPolynomial,
  kInverseSqrt,
  kCosineWithMinLr,
  kWarmupStableDecay,
  kPiecewiseConstant,
};

/// By the names that flags and transformers use, for Tool::flag.
const std::vector<std::pair<std::string, LrSchedule>>& lr_schedules();

struct LrOptions {
  LrSchedule schedule = LrSchedule::kConstant;
  double learning_rate = 1e-4;
  int64_t num_steps =
      0;  // of the whole run; constant, constant_with_warmup and inverse_sqrt do not need it
  int64_t num_warmup_steps =
      0;  // linear from 0 (warmup_stable_decay: from min_lr_ratio); constant ignores it
  double num_cycles = 1;  // cosine_with_restarts: falls of the cosine
  double power = 1;       // polynomial
  double lr_end = 1e-7;   // polynomial: absolute
  /// Of learning_rate: what linear, cosine, cosine_with_restarts, cosine_with_min_lr and warmup_stable_decay fall to
  /// instead of 0, and what inverse_sqrt does not fall below.
  double min_lr_ratio = 0;
  int64_t num_timescale_steps = 0;  // inverse_sqrt; 0: the warm-up, or 10000
  int64_t num_decay_steps = 0;  // warmup_stable_decay; the stable part is what remains of num_steps
  std::string
      step_rules{};  // piecewise_constant: "1:10,0.1:20,0.005" = factor 1 below step 10, ...,
                     // then 0.005
};

/// "1:10,0.1:20,0.005" can be read: throws std::invalid_argument if not.
void check_step_rules(const std::string& rules);

/// Learning rate of step `step`, counted from 0. Throws std::invalid_argument for step_rules that
/// cannot be read.
double learning_rate(const LrOptions& options, int64_t step);

}  // namespace flux
