#include "common/optim/adamw_scalars.h"

#include <fmt/format.h>

#include <cmath>
#include <stdexcept>

namespace flux {

AdamWScalars adamw_scalars(double learning_rate, const AdamWOptions& options, int64_t step) {
  if (step < 1) throw std::invalid_argument(fmt::format("AdamW step {}, steps count from 1", step));
  const auto t = static_cast<double>(step);
  return {static_cast<float>(1 - learning_rate * options.weight_decay),
          static_cast<float>(1 - options.beta1),
          static_cast<float>(options.beta2),
          static_cast<float>(1 - options.beta2),
          static_cast<float>(learning_rate / (1 - std::pow(options.beta1, t))),
          static_cast<float>(std::sqrt(1 - std::pow(options.beta2, t))),
          static_cast<float>(options.eps)};
}

}  // namespace flux
