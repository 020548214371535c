// The optimizers themselves: their states, and the numbers of a step.
#include <ATen/ops/empty.h>
#include <ATen/ops/lerp.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <stdexcept>

#include "common/optim/adamw8bit_math.h"
#include "common/optim/adamw_scalars.h"
#include "common/optim/elements_math.h"
#include "common/optim/run_update.h"

namespace flux {
namespace {

float f32(double value) { return static_cast<float>(value); }

int64_t count_of(c10::IntArrayRef shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

/// Makes `kept` hold at least n elements on the parameter's device.
void grow(at::Tensor& kept, int64_t n, const at::Tensor& parameter, at::ScalarType type) {
  if (kept.defined() && kept.numel() >= n && kept.device() == parameter.device()) return;
  kept.reset();
  kept = at::empty({n}, parameter.options().dtype(type));
}

class AdamW final : public Optimizer {
 public:
  AdamW(const AdamWOptions& options, OptimizerPrecision precision)
      : Optimizer(precision), options_(options) {}
  std::string_view name() const override { return "adamw"; }

 protected:
  std::vector<StateTensor> moments(c10::IntArrayRef shape, int64_t /*elements*/) const override {
    return {{"exp_avg", precision().states, shape.vec()},
            {"exp_avg_sq", precision().states, shape.vec()}};
  }
  void update(const Slot& slot, const StepScalars& step) override {
    run_update(slot,
               step,
               precision(),
               UpdateKind::kAdamW,
               adamw_scalars(step.learning_rate, options_, step.step));
  }

 private:
  AdamWOptions options_;
};

class AdamW8bit final : public Optimizer {
 public:
  AdamW8bit(const AdamW8bitOptions& options, OptimizerPrecision precision)
      : Optimizer(precision), options_(options) {}
  std::string_view name() const override { return "adamw8bit"; }

 protected:
  std::vector<StateTensor> moments(c10::IntArrayRef shape, int64_t elements) const override {
    const int64_t n = count_of(shape);
    if (elements < options_.min_8bit_size)
      return {{"state1", at::kFloat, shape.vec()}, {"state2", at::kFloat, shape.vec()}};
    const std::vector<int64_t> blocks{(n + kBlock8 - 1) / kBlock8};
    return {{"state1", at::kByte, shape.vec()},
            {"state2", at::kByte, shape.vec()},
            {"absmax1", at::kFloat, blocks},
            {"absmax2", at::kFloat, blocks}};
  }
  void update(const Slot& slot, const StepScalars& step) override {
    const auto t = static_cast<double>(step.step);
    const double size = step.learning_rate / (1 - std::pow(options_.beta1, t)),
                 correction = std::sqrt(1 - std::pow(options_.beta2, t));
    AdamW8bitScalars s{};
    s.decay = static_cast<float>(1 - step.learning_rate * options_.weight_decay);
    s.beta1 = static_cast<float>(options_.beta1);
    s.one_minus_beta1 = static_cast<float>(1 - options_.beta1);
    s.beta2 = static_cast<float>(options_.beta2);
    s.one_minus_beta2 = static_cast<float>(1 - options_.beta2);
    s.step_size = static_cast<float>(size);
    s.correction2 = static_cast<float>(correction);
    s.eps = static_cast<float>(options_.eps);
    s.small_step = static_cast<float>(size * correction);
    s.small_eps = static_cast<float>(options_.eps * correction);
    run_update(slot, step, precision(), UpdateKind::kAdamW8bit, s);
  }

 private:
  AdamW8bitOptions options_;
};

class Adafactor final : public Optimizer {
 public:
  Adafactor(const AdafactorOptions& options, OptimizerPrecision precision)
      : Optimizer(precision), options_(options) {
    if (options.warmup_init && !options.relative_step)
      throw std::invalid_argument("Adafactor's warmup_init needs relative_step");
  }
  std::string_view name() const override { return "adafactor"; }

 protected:
  std::vector<StateTensor> moments(c10::IntArrayRef shape, int64_t /*elements*/) const override {
    std::vector<StateTensor> out;
    if (shape.size() >= 2) {
      std::vector<int64_t> rows = shape.vec(), columns = shape.vec();
      rows.pop_back();
      columns.erase(columns.end() - 2);
      out = {{"exp_avg_sq_row", at::kFloat, rows}, {"exp_avg_sq_col", at::kFloat, columns}};
    } else {
      out = {{"exp_avg_sq", at::kFloat, shape.vec()}};
    }
    if (options_.beta1) out.push_back({"exp_avg", precision().states, shape.vec()});
    return out;
  }
  void update(const Slot& slot, const StepScalars& step) override {
    const auto t = static_cast<double>(step.step);
    const double beta2 = 1 - std::pow(t, options_.decay_rate), beta1 = options_.beta1.value_or(0);
    double rate = step.learning_rate;
    if (options_.relative_step)
      rate = std::min(options_.warmup_init ? 1e-6 * t : 1e-2, 1 / std::sqrt(t));
    AdafactorScalars s{};
    s.beta2 = static_cast<float>(beta2);
    s.one_minus_beta2 = static_cast<float>(1 - beta2);
    s.eps1 = static_cast<float>(options_.eps1);
    s.eps2 = static_cast<float>(options_.eps2);
    s.clip_threshold = static_cast<float>(options_.clip_threshold);
    s.learning_rate = static_cast<float>(rate);
    s.beta1 = static_cast<float>(beta1);
    s.one_minus_beta1 = static_cast<float>(1 - beta1);
    s.weight_decay = static_cast<float>(options_.weight_decay);
    s.has_beta1 = options_.beta1 ? 1 : 0;
    s.scale_parameter = options_.scale_parameter ? 1 : 0;

    const at::Tensor& p = slot.parameter;
    const int64_t num_floats = p.dim() < 2 ? 1 : adafactor_num_floats(adafactor_shape(p.sizes()));
    grow(sums_, adafactor_num_sums(p.numel()), p, at::kDouble);
    grow(floats_, num_floats, p, at::kFloat);
    run_update(slot, step, precision(), UpdateKind::kAdafactor, s, {sums_, floats_});
  }

 private:
  AdafactorOptions options_;
  at::Tensor sums_, floats_;  // kept, so that the heap does not grow by holes of their size
};

class Lion final : public Optimizer {
 public:
  Lion(const LionOptions& options, OptimizerPrecision precision)
      : Optimizer(precision), options_(options) {}
  std::string_view name() const override { return "lion"; }

 protected:
  std::vector<StateTensor> moments(c10::IntArrayRef shape, int64_t /*elements*/) const override {
    return {{"exp_avg", precision().states, shape.vec()}};
  }
  void update(const Slot& slot, const StepScalars& step) override {
    LionScalars s{};
    s.decay = f32(1 - step.learning_rate * options_.weight_decay);
    s.beta1 = f32(options_.beta1);
    s.one_minus_beta1 = f32(1 - options_.beta1);
    s.beta2 = f32(options_.beta2);
    s.one_minus_beta2 = f32(1 - options_.beta2);
    s.learning_rate = f32(step.learning_rate);
    run_update(slot, step, precision(), UpdateKind::kLion, s);
  }

 private:
  LionOptions options_;
};

class Sgd final : public Optimizer {
 public:
  Sgd(const SgdOptions& options, OptimizerPrecision precision)
      : Optimizer(precision), options_(options) {}
  std::string_view name() const override { return "sgd"; }

 protected:
  std::vector<StateTensor> moments(c10::IntArrayRef shape, int64_t /*elements*/) const override {
    return {{"momentum_buffer", precision().states, shape.vec()}};
  }
  void update(const Slot& slot, const StepScalars& step) override {
    SgdScalars s{};
    s.learning_rate = f32(step.learning_rate);
    s.momentum = f32(options_.momentum);
    s.weight_decay = f32(options_.weight_decay);
    s.nesterov = options_.nesterov ? 1 : 0;
    run_update(slot, step, precision(), UpdateKind::kSgd, s);
  }

 private:
  SgdOptions options_;
};

class ScheduleFree final : public Optimizer {
 public:
  ScheduleFree(const ScheduleFreeOptions& options, OptimizerPrecision precision)
      : Optimizer(precision), options_(options) {}
  std::string_view name() const override { return "schedulefree"; }

  void begin_step(const StepScalars& step) override {
    lr_max_ = std::max(lr_max_, step.learning_rate);
    const double weight = std::pow(static_cast<double>(step.step), options_.r) *
                          std::pow(lr_max_, options_.weight_lr_power);
    weight_sum_ += weight;
    towards_z_ = weight_sum_ > 0 ? weight / weight_sum_ : 0;
    begun_ = step.step;
  }
  std::map<std::string, double> numbers() const override {
    return {{"lr_max", lr_max_}, {"weight_sum", weight_sum_}};
  }
  void set_numbers(const std::map<std::string, double>& numbers) override {
    lr_max_ = numbers.at("lr_max");
    weight_sum_ = numbers.at("weight_sum");
  }
  bool averages() const override { return true; }

 protected:
  at::Tensor evaluated(const Slot& slot) const override {
    const Keep keep = keep_of(slot.parameter.scalar_type(), precision().weights);
    at::Tensor y = keep == Keep::kMaster ? slot.states.back() : slot.parameter.to(at::kFloat);
    if (keep == Keep::kKahan) y = y + slot.states.back();
    return at::lerp(y, slot.states[0], 1 - 1 / options_.beta1).to(slot.parameter.scalar_type());
  }
  std::vector<StateTensor> moments(c10::IntArrayRef shape, int64_t /*elements*/) const override {
    return {{"z", at::kFloat, shape.vec()}, {"exp_avg_sq", at::kFloat, shape.vec()}};
  }
  void update(const Slot& slot, const StepScalars& step) override {
    if (begun_ != step.step) {
      throw std::invalid_argument(
          fmt::format("schedulefree: step {} was not begun, {} was", step.step, begun_));
    }
    ScheduleFreeScalars s{};
    s.beta2 = f32(options_.beta2);
    s.one_minus_beta2 = f32(1 - options_.beta2);
    s.correction2 = f32(1 - std::pow(options_.beta2, static_cast<double>(step.step)));
    s.eps = f32(options_.eps);
    s.weight_decay = f32(options_.weight_decay);
    s.towards_z = f32(towards_z_);
    s.learning_rate = f32(step.learning_rate);
    s.y_step = f32(step.learning_rate * (options_.beta1 * (1 - towards_z_) - 1));
    s.first = step.step == 1 ? 1 : 0;
    run_update(slot, step, precision(), UpdateKind::kScheduleFree, s);
  }

 private:
  ScheduleFreeOptions options_;
  double lr_max_ = 0, weight_sum_ = 0;
  double towards_z_ = 0;
  int64_t begun_ = 0;
};

class Prodigy final : public Optimizer {
 public:
  Prodigy(const ProdigyOptions& options, OptimizerPrecision precision)
      : Optimizer(precision), options_(options), d_(options.d0), d_max_(options.d0) {
    if (!(options.d0 > 0))
      throw std::invalid_argument(
          fmt::format("Prodigy's d0 is {}, it must be above 0", options.d0));
  }
  std::string_view name() const override { return "prodigy"; }
  bool two_phase() const override { return true; }

  void begin_step(const StepScalars& step) override {
    rate_ = d_ * step.learning_rate;
    if (options_.use_bias_correction) {
      rate_ *=
          std::sqrt(1 - std::pow(options_.beta2, k_ + 1)) / (1 - std::pow(options_.beta1, k_ + 1));
    }
    d_before_ = d_;
    delta_ = denominator_ = 0;
  }
  void end_observe() override {
    // no gradient at all: the step is left out
    skip_ = denominator_ == 0;
    if (skip_) return;
    d_numerator_ = d_numerator_ * beta3() + delta_;
    const double estimate = options_.d_coef * d_numerator_ / denominator_;
    if (d_ == options_.d0) d_ = std::max(d_, estimate);
    d_max_ = std::max(d_max_, estimate);
    d_ = std::min(d_max_, d_ * options_.growth_rate);
    k_ += 1;
  }
  std::map<std::string, double> numbers() const override {
    return {{"d", d_}, {"d_max", d_max_}, {"d_numerator", d_numerator_}, {"k", k_}};
  }
  void set_numbers(const std::map<std::string, double>& numbers) override {
    d_ = numbers.at("d");
    d_max_ = numbers.at("d_max");
    d_numerator_ = numbers.at("d_numerator");
    k_ = numbers.at("k");
  }

 protected:
  std::vector<StateTensor> moments(c10::IntArrayRef shape, int64_t /*elements*/) const override {
    return {{"exp_avg", precision().states, shape.vec()},
            {"exp_avg_sq", precision().states, shape.vec()},
            {"s", at::kFloat, shape.vec()},
            {"p0", at::kFloat, shape.vec()}};
  }
  void look(const Slot& slot, const StepScalars& step) override {
    const double d = d_before_, of_d0 = d / options_.d0;
    ProdigyScalars s{};
    s.beta1 = f32(options_.beta1);
    s.gradient1 = f32(d * (1 - options_.beta1));
    s.beta2 = f32(options_.beta2);
    s.gradient2 = f32(d * d * (1 - options_.beta2));
    s.beta3 = f32(beta3());
    s.gradient3 = f32(of_d0 * (options_.safeguard_warmup ? d : rate_));
    s.first = step.step == 1 ? 1 : 0;
    const int64_t num_sums = prodigy_num_sums(slot.parameter.numel());
    grow(sums_, num_sums, slot.parameter, at::kDouble);
    const at::Tensor sums = sums_.narrow(0, 0, num_sums);
    run_update(slot, step, precision(), UpdateKind::kProdigyObserve, s, sums);
    if (sums.is_meta()) return;
    const at::Tensor totals = sums.narrow(0, num_sums - 2, 2).cpu();
    const auto* const values = totals.const_data_ptr<double>();
    delta_ += of_d0 * rate_ * values[0];
    denominator_ += values[1];
  }
  void update(const Slot& slot, const StepScalars& step) override {
    if (skip_) return;
    ProdigyScalars s{};
    s.eps = f32(d_ * options_.eps);
    s.learning_rate = f32(rate_);
    s.decay = f32(-options_.weight_decay * rate_);
    run_update(slot, step, precision(), UpdateKind::kProdigy, s);
  }

 private:
  double beta3() const { return options_.beta3.value_or(std::sqrt(options_.beta2)); }

  ProdigyOptions options_;
  double d_, d_max_, d_numerator_ = 0, k_ = 0;
  double d_before_ = 0, rate_ = 0, delta_ = 0, denominator_ = 0;  // of this step
  bool skip_ = false;
  at::Tensor sums_;
};

}  // namespace

std::unique_ptr<Optimizer> make_optimizer(const OptimizerOptions& options,
                                          OptimizerPrecision precision) {
  if (precision.states != at::kFloat && precision.states != at::kBFloat16) {
    throw std::invalid_argument(
        fmt::format("optimizer states in {}: Float or BFloat16", c10::toString(precision.states)));
  }
  struct Make {
    OptimizerPrecision precision;
    using Made = std::unique_ptr<Optimizer>;
    Made operator()(const AdamWOptions& o) const { return std::make_unique<AdamW>(o, precision); }
    Made operator()(const AdamW8bitOptions& o) const {
      return std::make_unique<AdamW8bit>(o, precision);
    }
    Made operator()(const AdafactorOptions& o) const {
      return std::make_unique<Adafactor>(o, precision);
    }
    Made operator()(const LionOptions& o) const { return std::make_unique<Lion>(o, precision); }
    Made operator()(const ProdigyOptions& o) const {
      return std::make_unique<Prodigy>(o, precision);
    }
    Made operator()(const ScheduleFreeOptions& o) const {
      return std::make_unique<ScheduleFree>(o, precision);
    }
    Made operator()(const SgdOptions& o) const { return std::make_unique<Sgd>(o, precision); }
  };
  return std::visit(Make{precision}, options);
}

}  // namespace flux
