#include "common/optim/optimizer.h"

#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <cmath>
#include <functional>
#include <numeric>
#include <stdexcept>

#include "common/core/rng.h"
#include "common/core/text.h"
#include "common/optim/adamw8bit_math.h"
#include "common/optim/adamw_scalars.h"
#include "common/optim/optimizer_op.h"
#include "common/tensor/tensor.h"

namespace flux {
namespace {

int64_t count_of(c10::IntArrayRef shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

bool is_float(c10::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; }

void check_operand(const std::string& name,
                   const at::Tensor& tensor,
                   c10::IntArrayRef shape,
                   const at::Tensor& parameter) {
  check_shape(name, tensor, shape);
  if (tensor.device() != parameter.device()) {
    throw std::invalid_argument(fmt::format(
        "{} is on {}, the parameter on {}", name, tensor.device().str(), parameter.device().str()));
  }
  if (!tensor.is_contiguous())
    throw std::invalid_argument(fmt::format("{} is not contiguous", name));
}

void check_slot(const Slot& slot, const std::vector<StateTensor>& layout) {
  const at::Tensor& p = slot.parameter;
  check_operand("parameter", p, p.sizes(), p);
  check_operand("gradient", slot.gradient, p.sizes(), p);
  for (const auto& [name, tensor] :
       {std::pair<const char*, const at::Tensor&>("parameter", p), {"gradient", slot.gradient}}) {
    if (is_float(tensor.scalar_type())) continue;
    throw std::invalid_argument(fmt::format(
        "{} is {}, optimizers take Float or BFloat16", name, c10::toString(tensor.scalar_type())));
  }
  if (slot.offset % 1024 != 0) {
    throw std::invalid_argument(
        fmt::format("offset {} of a slice is not a multiple of 1024", slot.offset));
  }
  if (slot.states.size() != layout.size()) {
    throw std::invalid_argument(
        fmt::format("{} states given, {} expected", slot.states.size(), layout.size()));
  }
  for (size_t i = 0; i < layout.size(); ++i) {
    check_operand(layout[i].name, slot.states[i], layout[i].shape, p);
    if (slot.states[i].scalar_type() != layout[i].dtype) {
      throw std::invalid_argument(fmt::format("{} is {}, expected {}",
                                              layout[i].name,
                                              c10::toString(slot.states[i].scalar_type()),
                                              c10::toString(layout[i].dtype)));
    }
  }
}

Keep keep_of(c10::ScalarType parameter, WeightMode mode) {
  if (parameter == at::kFloat) return Keep::kFloat;
  switch (mode) {
    case WeightMode::kStochastic:
      return Keep::kStochastic;
    case WeightMode::kNearest:
      return Keep::kNearest;
    case WeightMode::kKahan:
      return Keep::kKahan;
    case WeightMode::kMaster:
      return Keep::kMaster;
  }
  throw std::invalid_argument("unknown weight mode");
}

/// Four words of the project's stream for this step and parameter are the key of the parameter's own.
RoundingKey rounding_key(const StepScalars& scalars, uint64_t id) {
  const RandomStream words(
      scalars.seed, Purpose::kStochasticRounding, static_cast<uint64_t>(scalars.step), id);
  return {{words.bits(0), words.bits(1)}, {words.bits(2), words.bits(3)}};
}

template <class Scalars>
void run(const Slot& slot,
         const StepScalars& step,
         const OptimizerPrecision& precision,
         UpdateKind kind,
         const Scalars& scalars,
         at::TensorList scratch = {}) {
  StepKey key;
  key.keep = keep_of(slot.parameter.scalar_type(), precision.weights);
  key.first = step.step == 1;
  if (key.keep == Keep::kStochastic) key.rounding = rounding_key(step, slot.id);
  key.gradient_scale = static_cast<float>(step.gradient_scale);
  key.offset = slot.offset;
  optimizer_step(
      slot.parameter, slot.gradient, slot.states, scratch, kind, to_numbers(scalars), key);
}

class AdamW final : public Optimizer {
 public:
  AdamW(const AdamWOptions& options, OptimizerPrecision precision)
      : Optimizer(precision), options_(options) {}
  std::string_view name() const override { return "adamw"; }

 protected:
  std::vector<StateTensor> moments(c10::IntArrayRef shape) const override {
    return {{"exp_avg", precision().states, shape.vec()},
            {"exp_avg_sq", precision().states, shape.vec()}};
  }
  void update(const Slot& slot, const StepScalars& step) override {
    run(slot,
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
  std::vector<StateTensor> moments(c10::IntArrayRef shape) const override {
    const int64_t n = count_of(shape);
    if (n < options_.min_8bit_size)
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
    run(slot, step, precision(), UpdateKind::kAdamW8bit, s);
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
  std::vector<StateTensor> moments(c10::IntArrayRef shape) const override {
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
    std::vector<at::Tensor> scratch{
        at::empty({adafactor_num_sums(p.numel())}, p.options().dtype(at::kDouble))};
    if (p.dim() >= 2) {
      scratch.push_back(at::empty({adafactor_num_floats(adafactor_shape(p.sizes()))},
                                  p.options().dtype(at::kFloat)));
    }
    run(slot, step, precision(), UpdateKind::kAdafactor, s, scratch);
  }

 private:
  AdafactorOptions options_;
};

}  // namespace

std::vector<StateTensor> Optimizer::state_layout(c10::IntArrayRef shape,
                                                 c10::ScalarType dtype) const {
  std::vector<StateTensor> out = moments(shape);
  const Keep keep = keep_of(dtype, precision_.weights);
  if (keep == Keep::kKahan) out.push_back({"compensation", at::kBFloat16, shape.vec()});
  if (keep == Keep::kMaster) out.push_back({"master", at::kFloat, shape.vec()});
  return out;
}

void Optimizer::step(const Slot& slot, const StepScalars& scalars) {
  if (scalars.step < 1) {
    throw std::invalid_argument(
        fmt::format("{} step {}, steps count from 1", name(), scalars.step));
  }
  check_slot(slot, state_layout(slot.parameter.sizes(), slot.parameter.scalar_type()));
  if (slot.parameter.numel() > 0) update(slot, scalars);
}

void Optimizer::observe(const Slot& /*slot*/, const StepScalars& /*scalars*/) {
  throw std::invalid_argument(fmt::format("{} has one phase only", name()));
}

std::unique_ptr<Optimizer> make_optimizer(const OptimizerOptions& options,
                                          OptimizerPrecision precision) {
  if (!is_float(precision.states)) {
    throw std::invalid_argument(
        fmt::format("optimizer states in {}: Float or BFloat16", c10::toString(precision.states)));
  }
  return std::visit(
      [&]<class Options>(const Options& o) -> std::unique_ptr<Optimizer> {
        if constexpr (std::is_same_v<Options, AdamWOptions>)
          return std::make_unique<AdamW>(o, precision);
        else if constexpr (std::is_same_v<Options, AdamW8bitOptions>)
          return std::make_unique<AdamW8bit>(o, precision);
        else
          return std::make_unique<Adafactor>(o, precision);
      },
      options);
}

}  // namespace flux
