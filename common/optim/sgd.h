// common/optim/sgd.h - stochastic gradient descent with momentum.
#pragma once

namespace flux {

/// d = g + weight_decay p,  m <- momentum m + d,  p <- p - lr m, or - lr (d + momentum m) with nesterov.
/// State: momentum_buffer. Source: torch.optim.SGD, without dampening.
struct SgdOptions {
  double momentum = 0.9;
  double weight_decay = 0;
  bool nesterov = false;
};

}  // namespace flux
