// tests/support/flux_cases.h - the reference cases of the FLUX transformer as inputs of forward().
#pragma once
#include <ATen/ATen.h>

#include <filesystem>
#include <string>

#include "common/models/flux/transformer.h"
#include "common/tensor/weight_file.h"

namespace flux::test {

/// A folder of reference vectors of kinds flux, lora, train, euler.
inline std::filesystem::path golden_models() {
  return std::filesystem::path(FLUX_SOURCE_DIR) / "tests/golden/models";
}

/// "input.*" of a forward_*.safetensors.
inline dit::Inputs flux_inputs(const TensorMap& vectors) {
  dit::Inputs in;
  in.img = vectors.at("input.img");
  in.txt = vectors.at("input.txt");
  in.y = vectors.at("input.y");
  in.timestep = vectors.at("input.timestep");
  if (vectors.contains("input.guidance")) in.guidance = vectors.at("input.guidance");
  in.img_ids = vectors.at("input.img_ids");
  in.txt_ids = vectors.at("input.txt_ids");
  return in;
}

/// The elements that reference vectors keep of a big tensor: (j * 1000003) mod numel for j = 0..63.
inline at::Tensor samples(const at::Tensor& tensor, int64_t count = 64) {
  const int64_t n = tensor.numel();
  return tensor.detach().flatten().index_select(
      0, at::arange(std::min(count, n), at::kLong) * 1000003 % n);
}

}  // namespace flux::test
