// pipelines/train/step.h - one optimizer update.
#pragma once
#include <optional>
#include <span>
#include <vector>

#include "common/data/training_data.h"
#include "pipelines/train/load.h"

namespace flux::train {

struct StepResult {
  double loss = 0, learning_rate = 0;
  std::optional<double> grad_norm;         // before clipping, where it is computed
  std::vector<double> sigma, sample_loss;  // of each sample of the step, in order of batches
};

/// `batches`: this rank's; `outline`: of all ranks' batches of the step, in order. Draws the noise levels, computes loss and gradients of the batches of one update, clips, and updates every
/// parameter. Session::step counts on. Throws InputError with the samples' names if loss or gradients are not finite:
/// before anything is updated, but for gradients of a full fine-tuning without global clipping.
StepResult train_step(Session& session,
                      std::span<const Batch> batches,
                      std::span<const BatchOutline> outline);

}  // namespace flux::train
