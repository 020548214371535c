// common/models/flux/names.h - tensor names and shapes of the BFL and the diffusers layout. No
// LibTorch.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "common/models/flux/config.h"

namespace flux::dit {

struct NamedShape {
  std::string name;
  std::vector<int64_t> shape;
};

/// Every tensor of the model under its BFL name, in the order of black-forest-labs/flux,
/// src/flux/model.py (780 for dev).
std::vector<NamedShape> tensor_shapes(const Config& config);

/// One diffusers tensor and where it lies in the BFL layout: `num_rows` rows of tensor `bfl` from
/// `first_row`. With `swap_halves` the two halves of the rows change places.
struct DiffusersTensor {
  std::string name;
  std::string bfl;
  int64_t first_row = 0;
  std::vector<int64_t> shape;
  bool swap_halves = false;
  int64_t num_rows() const { return shape[0]; }
};

/// Every diffusers tensor of the model; those that make one BFL tensor follow each other in the
/// order of their rows.
std::vector<DiffusersTensor> diffusers_layout(const Config& config);

}  // namespace flux::dit
