#include "pipelines/train/optimizer.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <variant>
#include <vector>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::train {
namespace {

using Set = std::function<void(const std::string& text)>;
using Setters = std::map<std::string, Set>;

[[noreturn]] void refuse(const std::string& text, const char* what) {
  throw UsageError(fmt::format("--optimizer-args: '{}' is not {}", printable(text), what));
}

double number(const std::string& text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || std::isnan(value))
    refuse(text, "a number");
  return value;
}

Set set(double& value) {
  return [&value](const std::string& text) { value = number(text); };
}
Set set(std::optional<double>& value) {
  return [&value](const std::string& text) { value = number(text); };
}
Set set(bool& value) {
  return [&value](const std::string& text) {
    if (text != "true" && text != "false") refuse(text, "true or false");
    value = text == "true";
  };
}

Setters setters(AdamWOptions& o) {
  return {{"beta1", set(o.beta1)}, {"beta2", set(o.beta2)}, {"eps", set(o.eps)}};
}
Setters setters(AdamW8bitOptions& o) {
  return {{"beta1", set(o.beta1)}, {"beta2", set(o.beta2)}, {"eps", set(o.eps)}};
}
Setters setters(AdafactorOptions& o) {
  return {{"eps1", set(o.eps1)},
          {"eps2", set(o.eps2)},
          {"clip_threshold", set(o.clip_threshold)},
          {"decay_rate", set(o.decay_rate)},
          {"beta1", set(o.beta1)},
          {"scale_parameter", set(o.scale_parameter)},
          {"relative_step", set(o.relative_step)},
          {"warmup_init", set(o.warmup_init)}};
}
Setters setters(LionOptions& o) { return {{"beta1", set(o.beta1)}, {"beta2", set(o.beta2)}}; }
Setters setters(ProdigyOptions& o) {
  return {{"beta1", set(o.beta1)},
          {"beta2", set(o.beta2)},
          {"beta3", set(o.beta3)},
          {"eps", set(o.eps)},
          {"d0", set(o.d0)},
          {"d_coef", set(o.d_coef)},
          {"growth_rate", set(o.growth_rate)},
          {"use_bias_correction", set(o.use_bias_correction)},
          {"safeguard_warmup", set(o.safeguard_warmup)}};
}
Setters setters(ScheduleFreeOptions& o) {
  return {{"beta1", set(o.beta1)},
          {"beta2", set(o.beta2)},
          {"eps", set(o.eps)},
          {"r", set(o.r)},
          {"weight_lr_power", set(o.weight_lr_power)}};
}
Setters setters(SgdOptions& o) {
  return {{"momentum", set(o.momentum)}, {"nesterov", set(o.nesterov)}};
}

OptimizerOptions defaults(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::kAdamW:
      return AdamWOptions{};
    case OptimizerKind::kAdamW8bit:
      return AdamW8bitOptions{};
    case OptimizerKind::kAdafactor:
      return AdafactorOptions{};
    case OptimizerKind::kLion:
      return LionOptions{};
    case OptimizerKind::kProdigy:
      return ProdigyOptions{};
    case OptimizerKind::kScheduleFree:
      return ScheduleFreeOptions{};
    case OptimizerKind::kSgd:
      return SgdOptions{};
  }
  throw std::invalid_argument("no such optimizer");
}

}  // namespace

OptimizerOptions optimizer_options(const Options& options) {
  OptimizerOptions out = defaults(options.optimizer);
  std::visit(
      [&](auto& o) {
        o.weight_decay = options.effective_weight_decay();
        const Setters known = setters(o);
        for (const std::string& argument : split(options.optimizer_args, ',')) {
          if (argument.empty()) continue;
          const auto equals = argument.find('=');
          if (equals == std::string::npos) refuse(argument, "NAME=VALUE");
          const std::string name(trim(argument.substr(0, equals)));
          const auto found = known.find(name);
          if (found == known.end()) {
            std::vector<std::string> names;
            for (const auto& [key, setter] : known) names.push_back(key);
            throw UsageError(
                fmt::format("--optimizer-args: the optimizer has no '{}'", printable(name)),
                fmt::format("it has {}", fmt::join(names, ", ")));
          }
          found->second(std::string(trim(argument.substr(equals + 1))));
        }
      },
      out);
  return out;
}

OptimizerPrecision optimizer_precision(const Options& options) {
  return {
      options.weight_mode,
      options.state_dtype == StateDtype::kF32 ? c10::ScalarType::Float : c10::ScalarType::BFloat16};
}

std::string optimizer_title(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::kAdamW:
      return "AdamW";
    case OptimizerKind::kAdamW8bit:
      return "AdamW8bit";
    case OptimizerKind::kAdafactor:
      return "Adafactor";
    case OptimizerKind::kLion:
      return "Lion";
    case OptimizerKind::kProdigy:
      return "Prodigy";
    case OptimizerKind::kScheduleFree:
      return "AdamWScheduleFree";
    case OptimizerKind::kSgd:
      return "SGD";
  }
  throw std::invalid_argument("no such optimizer");
}

}  // namespace flux::train
