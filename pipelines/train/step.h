// pipelines/train/step.h - one optimizer update.
#pragma once
#include "common/data/training_data.h"
#include "pipelines/train/load.h"

namespace flux::train {

struct StepResult {
  double loss = 0, grad_norm = 0, learning_rate = 0;  // grad_norm before clipping
};

/// Draws the noise levels, computes loss and gradients, clips, and updates every parameter.
/// Session::step counts on. Throws InputError with the samples' names, before anything is updated,
/// if loss or gradients are not finite.
StepResult train_step(Session& session, const Batch& batch);

}  // namespace flux::train
