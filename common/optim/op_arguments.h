// common/optim/op_arguments.h - the arguments of flux::optimizer_step as its CPU and CUDA faces take
// them apart.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstring>
#include <iterator>
#include <stdexcept>
#include <vector>

#include "common/optim/adafactor_math.h"
#include "common/optim/operands.h"

namespace flux {

/// Which update the op makes. Not kept in files.
enum class UpdateKind : int64_t {
  kAdamW,
  kAdamW8bit,
  kAdafactor,
  kLion,
  kSgd,
  kScheduleFree,
  kProdigyObserve,  // scratch: doubles for two sums of each part, and the two totals
  kProdigy,
  kEma,
};

/// A struct of floats as the op's list of numbers, and back; both are exact.
template <class Scalars>
std::vector<double> to_numbers(const Scalars& scalars) {
  static_assert(sizeof(Scalars) % sizeof(float) == 0);
  float floats[sizeof(Scalars) / sizeof(float)];
  std::memcpy(floats, &scalars, sizeof scalars);
  return {std::begin(floats), std::end(floats)};
}
template <class Scalars>
Scalars from_numbers(c10::ArrayRef<double> numbers) {
  float floats[sizeof(Scalars) / sizeof(float)];
  if (numbers.size() != std::size(floats)) throw std::invalid_argument("optimizer_step: numbers");
  for (size_t i = 0; i < numbers.size(); ++i) floats[i] = static_cast<float>(numbers[i]);
  Scalars scalars;
  std::memcpy(&scalars, floats, sizeof scalars);
  return scalars;
}

/// `key` as optimizer_step() packs it: keep, first, bits of gradient_scale, key and high, offset.
Operands operands_of(const at::Tensor& parameter,
                     const at::Tensor& gradient,
                     at::TensorList states,
                     at::IntArrayRef key);

struct AdafactorArguments {
  AdafactorFactors factors;  // shape and full_means
  float *row_means, *column_means;
  double* sums;
  float* floats;
};
/// states: exp_avg_sq_row and exp_avg_sq_col, or exp_avg_sq; exp_avg with beta1, to which `operands`
/// is set. scratch: sums, and floats with factors.
AdafactorArguments adafactor_arguments(const at::Tensor& parameter,
                                       at::TensorList states,
                                       at::TensorList scratch,
                                       const AdafactorScalars& scalars,
                                       Operands& operands);
/// A shape of two or more dimensions as matrices.
AdafactorShape adafactor_shape(c10::IntArrayRef shape);

}  // namespace flux
