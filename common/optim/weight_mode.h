// common/optim/weight_mode.h - what becomes of updates below a bfloat16's last place. Free of LibTorch.
#pragma once

namespace flux {

/// How a bfloat16 parameter takes an update computed in float32; a float32 parameter just takes it.
enum class WeightMode {
  kStochastic,  // rounded up or down with the probability that keeps the mean
  kNearest,  // to nearest even: small updates are lost; with bfloat16 states AdamW and Lion round every
             // operation, as their libraries do where all tensors are bfloat16
  kKahan,   // to nearest even; what was lost is kept in one more bfloat16 tensor
  kMaster,  // a float32 copy takes the updates, the parameter is its rounding
};

}  // namespace flux
