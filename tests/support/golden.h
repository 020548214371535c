// tests/support/golden.h - committed reference vectors, and how far a tensor is from one.
#pragma once
#include <ATen/ATen.h>

#include <filesystem>

#include "common/tensor/weight_file.h"

namespace flux::test {

/// A safetensors file below tests/golden.
inline TensorMap golden(const std::filesystem::path& file) {
  return read_weights(std::filesystem::path(FLUX_SOURCE_DIR) / "tests/golden" / file).tensors;
}

/// l2 norm of the difference over l2 norm of the reference, in double.
inline double relative_error(const at::Tensor& value, const at::Tensor& reference) {
  const at::Tensor wanted = reference.to(at::kDouble);
  return ((value.to(at::kDouble) - wanted).norm() / wanted.norm()).item<double>();
}

/// Largest absolute difference, in double.
inline double largest_error(const at::Tensor& value, const at::Tensor& reference) {
  return (value.to(at::kDouble) - reference.to(at::kDouble)).abs().max().item<double>();
}

}  // namespace flux::test
