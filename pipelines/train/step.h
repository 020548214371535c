// pipelines/train/step.h - one optimizer update.
#pragma once
#include <ATen/core/Tensor.h>

#include "common/data/training_data.h"
#include "common/models/flux/transformer.h"
#include "pipelines/train/load.h"

namespace flux::train {

/// One batch as the model's loss takes it; latents and noise float32, everything on the model's
/// device.
struct FlowInputs {
  at::Tensor latents, noise;    // [B, 16, h, w]
  at::Tensor sigma;             // [B] float32
  at::Tensor prompt_embedding;  // [B, L, X]
  at::Tensor pooled_embedding;  // [B, V]
  at::Tensor text_mask;         // [B, L], or undefined
  at::Tensor loss_weight;       // [B] float32, or undefined: 1
  double guidance = 1;
};

/// Flow matching: the model sees the latents noised to sigma and must predict noise - latents.
/// Returns the mean over the samples of loss_per_sample() times weight; scalar float32 with its
/// graph.
at::Tensor flow_loss(const dit::Config& config,
                     const dit::Weights& weights,
                     const LossOptions& options,
                     const FlowInputs& inputs);

struct StepResult {
  double loss = 0, grad_norm = 0, learning_rate = 0;  // grad_norm before clipping
};

/// Draws the noise levels, computes loss and gradients, clips, and updates every parameter.
/// Session::step counts on. Throws InputError with the samples' names, before anything is updated,
/// if loss or gradients are not finite.
StepResult train_step(Session& session, const Batch& batch);

}  // namespace flux::train
