// common/train/per_sample.h - one value a sample, made to broadcast over a batch.
#pragma once
#include "common/tensor/fwd.h"

namespace flux {

/// `values` [B] as float32 [B, 1, ..] that broadcasts over `like` [B, ...]. Throws
/// std::invalid_argument that calls it sigma.
at::Tensor per_sample(const at::Tensor& values, const at::Tensor& like);

}  // namespace flux
