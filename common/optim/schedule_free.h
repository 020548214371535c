// common/optim/schedule_free.h - schedule-free AdamW: an average of the weights stands in for a falling
// learning rate.
#pragma once

namespace flux {

/// The weights that are trained are y = (1 - beta1) z + beta1 x, between the steps z of AdamW and
/// their average x, which is what to keep in the end (Optimizer::evaluation_weights). The weight of a
/// step in the average is step^r times the largest learning rate so far to the power weight_lr_power.
/// Weight decay acts at y. Warm-up is the schedule's.
///
/// States: z and exp_avg_sq, float32 whatever the precision of states, since z takes steps far below
/// a bfloat16's last place. Run numbers: weight_sum, lr_max.
/// Source: Defazio et al. 2024, arXiv:2405.15682; schedulefree 1.4, AdamWScheduleFree.
struct ScheduleFreeOptions {
  double beta1 = 0.9, beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  double r = 0, weight_lr_power = 2;
};

}  // namespace flux
