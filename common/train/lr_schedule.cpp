#include "common/train/lr_schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <numbers>
#include <stdexcept>

#include "common/core/text.h"

namespace flux {
namespace {

double half_cosine(double progress) { return 0.5 * (1 + std::cos(std::numbers::pi * progress)); }

template <class T>
T rule_number(std::string_view text, const std::string& rules) {
  T value{};
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || stop != text.data() + text.size()) {
    throw std::invalid_argument(fmt::format("step rules '{}': '{}' is not a number", rules, text));
  }
  return value;
}

// "1:10,0.1:20,0.005": the factor of the first rule whose step lies ahead, else the last factor.
double piecewise_factor(const std::string& rules, int64_t step) {
  for (const std::string& rule : split(rules, ',')) {
    const std::vector<std::string> parts = split(rule, ':');
    if (parts.size() > 2)
      throw std::invalid_argument(
          fmt::format("step rules '{}': '{}' is not FACTOR:STEP", rules, rule));
    const auto factor = rule_number<double>(trim(parts[0]), rules);
    if (parts.size() == 1 || step < rule_number<int64_t>(trim(parts[1]), rules)) return factor;
  }
  throw std::invalid_argument(
      fmt::format("step rules '{}' do not end with a factor of their own", rules));
}

}  // namespace

void check_step_rules(const std::string& rules) {
  piecewise_factor(rules, std::numeric_limits<int64_t>::max());
}

const std::vector<std::pair<std::string, LrSchedule>>& lr_schedules() {
  static const std::vector<std::pair<std::string, LrSchedule>> schedules{
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
  return schedules;
}

double learning_rate(const LrOptions& o, int64_t step) {
  const auto s = static_cast<double>(step), warmup = static_cast<double>(o.num_warmup_steps);
  const auto total = static_cast<double>(o.num_steps),
             decay = static_cast<double>(o.num_decay_steps);
  const double full = o.learning_rate;
  if (o.schedule == LrSchedule::kConstant) return full;
  if (o.schedule == LrSchedule::kPiecewiseConstant)
    return full * piecewise_factor(o.step_rules, step);

  if (step < o.num_warmup_steps) {
    const double progress = s / warmup;
    return full * (o.schedule == LrSchedule::kWarmupStableDecay
                       ? progress * (1 - o.min_lr_ratio) + o.min_lr_ratio
                       : progress);
  }
  const double progress = (s - warmup) / std::max(1.0, total - warmup);
  const auto falling = [&](double factor) {
    return full * (factor * (1 - o.min_lr_ratio) + o.min_lr_ratio);
  };
  switch (o.schedule) {
    case LrSchedule::kConstant:
    case LrSchedule::kPiecewiseConstant:
    case LrSchedule::kConstantWithWarmup:
      return full;
    case LrSchedule::kLinear:
      return falling(std::max(0.0, 1 - progress));
    case LrSchedule::kCosine:
    case LrSchedule::kCosineWithMinLr:
      return falling(half_cosine(progress));
    case LrSchedule::kCosineWithRestarts:
      return falling(progress >= 1 ? 0 : half_cosine(std::fmod(o.num_cycles * progress, 1.0)));
    case LrSchedule::kPolynomial:
      return step > o.num_steps ? o.lr_end
                                : (full - o.lr_end) * std::pow(1 - progress, o.power) + o.lr_end;
    case LrSchedule::kInverseSqrt: {
      const double timescale = o.num_timescale_steps > 0
                                   ? static_cast<double>(o.num_timescale_steps)
                               : o.num_warmup_steps > 0 ? warmup
                                                        : 10000.0;
      return std::max(full * o.min_lr_ratio,
                      full / std::sqrt((s + timescale - warmup) / timescale));
    }
    case LrSchedule::kWarmupStableDecay: {
      const double into_decay = s - (total - decay);
      if (into_decay < 0) return full;
      if (into_decay >= decay) return full * o.min_lr_ratio;
      return falling(half_cosine(into_decay / decay));
    }
  }
  throw std::invalid_argument("unknown learning rate schedule");
}

}  // namespace flux
