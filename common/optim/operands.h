// common/optim/operands.h - one parameter as the kernels of all optimizers get it. No LibTorch.
#pragma once
#include <cstdint>

#include "common/optim/rounding.h"

namespace flux {

/// How a new weight, computed in float32, is kept.
enum class Keep : int32_t {
  kFloat,    // the parameter is float32
  kNearest,  // the parameter is bfloat16, and so below
  kStochastic,
  kKahan,   // extra: bfloat16, what the last rounding lost
  kMaster,  // extra: float32, the weight itself
  kPlain,   // as kNearest, and every operation before is rounded too
};

struct Operands {
  void* parameter;
  const void* gradient;
  void* states[4];  // of what number and meaning the optimizer says
  void* extra;      // see Keep
  int64_t n;
  float gradient_scale;
  bool gradient_bf16;
  bool states_bf16;  // the first two
  bool first;        // step 1: a master copy is not filled yet
  Keep keep;
  RoundingKey key;
  int64_t offset;  // of element 0 in its stream of random numbers; a multiple of 1024
};

}  // namespace flux
