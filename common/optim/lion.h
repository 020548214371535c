// common/optim/lion.h - Lion: steps of the sign of a momentum.
#pragma once

namespace flux {

/// p <- p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g),  m <- beta2 m + (1 - beta2) g.
/// State: exp_avg. Source: Chen et al. 2023, arXiv:2302.06675; lion-pytorch 0.2.3.
struct LionOptions {
  double beta1 = 0.9, beta2 = 0.99;
  double weight_decay = 0;
};

}  // namespace flux
