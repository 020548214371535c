#include "common/optim/op_arguments.h"

#include <algorithm>

namespace flux {

Operands operands_of(const at::Tensor& parameter,
                     const at::Tensor& gradient,
                     at::TensorList states,
                     at::IntArrayRef key) {
  if (key.size() != 8) throw std::invalid_argument("optimizer_step: key");
  const auto word = [&](size_t i) { return static_cast<uint32_t>(key[i]); };
  Operands o{};
  o.parameter = parameter.data_ptr();
  o.gradient = gradient.const_data_ptr();
  o.n = parameter.numel();
  o.keep = static_cast<Keep>(key[0]);
  o.first = key[1] != 0;
  o.gradient_scale = float_of(word(2));
  o.gradient_bf16 = gradient.scalar_type() == at::kBFloat16;
  o.key = {{word(3), word(4)}, {word(5), word(6)}};
  o.offset = key[7];
  size_t num_moments = states.size();
  if (o.keep == Keep::kKahan || o.keep == Keep::kMaster) o.extra = states[--num_moments].data_ptr();
  for (size_t i = 0; i < std::min(num_moments, std::size(o.states)); ++i)
    o.states[i] = states[i].data_ptr();
  o.states_bf16 = num_moments > 0 && states[0].scalar_type() == at::kBFloat16;
  return o;
}

AdafactorShape adafactor_shape(c10::IntArrayRef shape) {
  const int64_t columns = shape[shape.size() - 1], rows = shape[shape.size() - 2];
  int64_t batch = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) batch *= shape[i];
  return {batch, rows, columns};
}

AdafactorArguments adafactor_arguments(const at::Tensor& parameter,
                                       at::TensorList states,
                                       at::TensorList scratch,
                                       const AdafactorScalars& scalars,
                                       Operands& o) {
  const auto floats = [](const at::Tensor& tensor) {
    return static_cast<float*>(tensor.data_ptr());
  };
  const bool factored = parameter.dim() >= 2;
  AdafactorArguments a{};
  a.sums = static_cast<double*>(scratch[0].data_ptr());
  if (factored) {
    a.factors.shape = adafactor_shape(parameter.sizes());
    a.row_means = floats(states[0]);
    a.column_means = floats(states[1]);
    a.floats = floats(scratch[1]);
  } else {
    a.factors.full_means = floats(states[0]);
  }
  std::fill(std::begin(o.states), std::end(o.states), nullptr);
  o.states_bf16 = false;
  if (scalars.has_beta1 != 0) {
    const at::Tensor& exp_avg = states[factored ? 2 : 1];
    o.states[0] = exp_avg.data_ptr();
    o.states_bf16 = exp_avg.scalar_type() == at::kBFloat16;
  }
  return a;
}

}  // namespace flux
