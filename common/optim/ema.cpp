#include "common/optim/ema.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "common/optim/elements_math.h"
#include "common/optim/run_update.h"
#include "common/tensor/tensor.h"

namespace flux {

double ema_decay(const EmaOptions& o, int64_t step) {
  const auto s = static_cast<double>(step - o.update_after_step - 1);
  if (s <= 0) return 0;
  const double decay =
      o.use_warmup ? 1 - std::pow(1 + s / o.inv_gamma, -o.power) : (1 + s) / (10 + s);
  return std::max(std::min(decay, o.decay), o.min_decay);
}

void ema_update(const at::Tensor& average,
                const at::Tensor& weights,
                double decay,
                uint64_t seed,
                int64_t step,
                uint64_t id,
                int64_t offset) {
  check_shape("weights", weights, average.sizes());
  for (const auto& [name, tensor] :
       {std::pair<const char*, const at::Tensor&>("average", average), {"weights", weights}}) {
    if (tensor.scalar_type() != at::kFloat && tensor.scalar_type() != at::kBFloat16) {
      throw std::invalid_argument(fmt::format(
          "{} is {}, expected Float or BFloat16", name, c10::toString(tensor.scalar_type())));
    }
    if (!tensor.is_contiguous())
      throw std::invalid_argument(fmt::format("{} is not contiguous", name));
    if (tensor.device() != average.device()) {
      throw std::invalid_argument(fmt::format(
          "{} is on {}, the average on {}", name, tensor.device().str(), average.device().str()));
    }
  }
  if (average.numel() == 0) return;
  StepKey key;
  key.keep = keep_of(average.scalar_type(), WeightMode::kStochastic);
  // not the numbers of the parameter's own step
  key.rounding = rounding_key(seed, step, id | uint64_t{1} << 63);
  key.offset = offset;
  optimizer_step(average,
                 weights,
                 {},
                 {},
                 UpdateKind::kEma,
                 to_numbers(EmaScalars{static_cast<float>(1 - decay)}),
                 key);
}

}  // namespace flux
