#include "common/optim/adamw.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <fmt/format.h>
#include <torch/library.h>

#include <stdexcept>

#include "common/optim/adamw_cpu.h"
#include "common/optim/adamw_scalars.h"
#include "common/tensor/tensor.h"

namespace flux {
namespace {

// Fewer elements than this cost less than waking another thread.
constexpr int64_t kGrain = 1 << 15;

using Step = void(const at::Tensor&,
                  const at::Tensor&,
                  const at::Tensor&,
                  const at::Tensor&,
                  double,
                  double,
                  double,
                  double,
                  double,
                  int64_t);

template <class T>
void run_cpu(const at::Tensor& parameter,
             const at::Tensor& gradient,
             const at::Tensor& exp_avg,
             const at::Tensor& exp_avg_sq,
             const AdamWScalars& scalars) {
  auto* const p = static_cast<T*>(parameter.data_ptr());
  const auto* const g = static_cast<const T*>(gradient.const_data_ptr());
  auto* const m = static_cast<T*>(exp_avg.data_ptr());
  auto* const v = static_cast<T*>(exp_avg_sq.data_ptr());
  at::parallel_for(0, parameter.numel(), kGrain, [&](int64_t begin, int64_t end) {
    adamw_cpu(p + begin, g + begin, m + begin, v + begin, end - begin, scalars);
  });
}

void step_cpu(const at::Tensor& parameter,
              const at::Tensor& gradient,
              const at::Tensor& exp_avg,
              const at::Tensor& exp_avg_sq,
              double learning_rate,
              double beta1,
              double beta2,
              double eps,
              double weight_decay,
              int64_t step) {
  const AdamWScalars scalars =
      adamw_scalars(learning_rate, {beta1, beta2, eps, weight_decay}, step);
  if (parameter.scalar_type() == at::kFloat) {
    run_cpu<float>(parameter, gradient, exp_avg, exp_avg_sq, scalars);
  } else {
    run_cpu<uint16_t>(parameter, gradient, exp_avg, exp_avg_sq, scalars);
  }
}

void step_meta(const at::Tensor&,
               const at::Tensor&,
               const at::Tensor&,
               const at::Tensor&,
               double,
               double,
               double,
               double,
               double,
               int64_t) {}

TORCH_LIBRARY_FRAGMENT(flux, library) {
  library.def(
      "adamw_step(Tensor(a!) parameter, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) "
      "exp_avg_sq, "
      "float learning_rate, float beta1, float beta2, float eps, float weight_decay, int step) -> "
      "()");
}
TORCH_LIBRARY_IMPL(flux, CPU, library) { library.impl("adamw_step", step_cpu); }
TORCH_LIBRARY_IMPL(flux, Meta, library) { library.impl("adamw_step", step_meta); }

void check_operand(const char* name, const at::Tensor& tensor, const at::Tensor& parameter) {
  check_shape(name, tensor, parameter.sizes());
  if (tensor.scalar_type() != parameter.scalar_type() || tensor.device() != parameter.device()) {
    throw std::invalid_argument(fmt::format("{} is {} on {}, the parameter is {} on {}",
                                            name,
                                            c10::toString(tensor.scalar_type()),
                                            tensor.device().str(),
                                            c10::toString(parameter.scalar_type()),
                                            parameter.device().str()));
  }
  if (!tensor.is_contiguous())
    throw std::invalid_argument(fmt::format("{} is not contiguous", name));
}

}  // namespace

void adamw_step(const at::Tensor& parameter,
                const at::Tensor& gradient,
                const at::Tensor& exp_avg,
                const at::Tensor& exp_avg_sq,
                double learning_rate,
                const AdamWOptions& options,
                int64_t step) {
  if (parameter.scalar_type() != at::kFloat && parameter.scalar_type() != at::kBFloat16) {
    throw std::invalid_argument(fmt::format("parameter is {}, AdamW takes Float or BFloat16",
                                            c10::toString(parameter.scalar_type())));
  }
  check_operand("parameter", parameter, parameter);
  check_operand("gradient", gradient, parameter);
  check_operand("exp_avg", exp_avg, parameter);
  check_operand("exp_avg_sq", exp_avg_sq, parameter);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flux::adamw_step", "").typed<Step>();
  op.call(parameter,
          gradient,
          exp_avg,
          exp_avg_sq,
          learning_rate,
          options.beta1,
          options.beta2,
          options.eps,
          options.weight_decay,
          step);
}

}  // namespace flux
