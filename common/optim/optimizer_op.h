// common/optim/optimizer_op.h - the one op behind all optimizers, flux::optimizer_step, with CPU, CUDA
// and Meta faces; what optimizer.cpp calls.
#pragma once
#include <ATen/core/Tensor.h>

#include "common/optim/op_arguments.h"

namespace flux {

/// Everything of an update that is not a tensor or a number of its kind.
struct StepKey {
  Keep keep = Keep::kFloat;
  bool first = false;
  RoundingKey rounding{};
  float gradient_scale = 1;
  int64_t offset = 0;
};

/// parameter, gradient, states: as Slot of optimizer.h says, checked; with Keep::kKahan or kMaster the
/// last state is what Keep keeps. scratch: as the kind needs it, of any content.
void optimizer_step(const at::Tensor& parameter,
                    const at::Tensor& gradient,
                    at::TensorList states,
                    at::TensorList scratch,
                    UpdateKind kind,
                    c10::ArrayRef<double> numbers,
                    const StepKey& key);

}  // namespace flux
