#include "common/optim/optimizer.h"

#include <fmt/format.h>

#include <stdexcept>

#include "common/core/rng.h"
#include "common/core/text.h"
#include "common/optim/run_update.h"
#include "common/tensor/tensor.h"

namespace flux {
namespace {

bool is_float(c10::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; }

void check_operand(const std::string& name,
                   const at::Tensor& tensor,
                   c10::IntArrayRef shape,
                   const at::Tensor& parameter,
                   bool on_host = false) {
  check_shape(name, tensor, shape);
  if (tensor.device() != parameter.device() && !(on_host && tensor.is_cpu())) {
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
    check_operand(layout[i].name, slot.states[i], layout[i].shape, p, layout[i].on_host);
    if (slot.states[i].scalar_type() != layout[i].dtype) {
      throw std::invalid_argument(fmt::format("{} is {}, expected {}",
                                              layout[i].name,
                                              c10::toString(slot.states[i].scalar_type()),
                                              c10::toString(layout[i].dtype)));
    }
  }
}

}  // namespace

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

RoundingKey rounding_key(uint64_t seed, int64_t step, uint64_t id) {
  const RandomStream words(seed, Purpose::kStochasticRounding, static_cast<uint64_t>(step), id);
  return {{words.bits(0), words.bits(1)}, {words.bits(2), words.bits(3)}};
}

StepKey step_key(const Slot& slot, const StepScalars& step, const OptimizerPrecision& precision) {
  StepKey key;
  key.keep = keep_of(slot.parameter.scalar_type(), precision.weights);
  if (key.keep == Keep::kNearest && precision.states == at::kBFloat16) key.keep = Keep::kPlain;
  key.first = step.step == 1;
  if (key.keep == Keep::kStochastic) key.rounding = rounding_key(step.seed, step.step, slot.id);
  key.gradient_scale = static_cast<float>(step.gradient_scale);
  key.offset = slot.offset;
  return key;
}

std::vector<StateTensor> Optimizer::state_layout(c10::IntArrayRef shape,
                                                 c10::ScalarType dtype,
                                                 int64_t offset) const {
  std::vector<StateTensor> out = moments(shape, offset + c10::multiply_integers(shape));
  const Keep keep = keep_of(dtype, precision_.weights);
  if (keep == Keep::kKahan) out.push_back({"compensation", at::kBFloat16, shape.vec()});
  if (keep == Keep::kMaster) out.push_back({"master", at::kFloat, shape.vec()});
  if (average_) out.push_back({"ema", average_->dtype, shape.vec(), /*on_host=*/true});
  return out;
}

void Optimizer::keep_average(const EmaOptions& options, c10::ScalarType dtype) {
  if (!is_float(dtype))
    throw std::invalid_argument(
        fmt::format("an average in {}: Float or BFloat16", c10::toString(dtype)));
  average_ = {options, dtype};
}

Slot Optimizer::without_average(const Slot& slot) const {
  Slot out = slot;
  if (average_) out.states.pop_back();
  return out;
}

void Optimizer::average(const Slot& slot, const StepScalars& scalars) const {
  if (!average_ || slot.parameter.numel() == 0) return;
  const Slot own = without_average(slot);
  at::Tensor weights = evaluated(own);
  if (!averages() && keep_of(slot.parameter.scalar_type(), precision_.weights) == Keep::kMaster)
    weights = own.states.back();
  const at::Tensor& average = slot.states.back();
  ema_update(average,
             weights.to(average.device()),
             ema_decay(average_->options, scalars.step),
             scalars.seed,
             scalars.step,
             slot.id,
             slot.offset);
}

at::Tensor Optimizer::averaged_weights(const Slot& slot) const {
  return slot.states.back().to(slot.parameter.scalar_type());
}

void Optimizer::check(const Slot& slot, const StepScalars& scalars) const {
  if (scalars.step < 1) {
    throw std::invalid_argument(
        fmt::format("{} step {}, steps count from 1", name(), scalars.step));
  }
  check_slot(slot, state_layout(slot.parameter.sizes(), slot.parameter.scalar_type(), slot.offset));
}

void Optimizer::step(const Slot& slot, const StepScalars& scalars) {
  check(slot, scalars);
  if (slot.parameter.numel() > 0) update(without_average(slot), scalars);
}

void Optimizer::observe(const Slot& slot, const StepScalars& scalars) {
  if (!two_phase()) throw std::invalid_argument(fmt::format("{} has one phase only", name()));
  check(slot, scalars);
  if (slot.parameter.numel() > 0) look(without_average(slot), scalars);
}

}  // namespace flux
