// common/ops/loss_type.h - what a loss does to the difference of an element. No LibTorch.
#pragma once

namespace flux {

enum class LossType { kL2, kL1, kHuber, kSmoothL1 };

}  // namespace flux
