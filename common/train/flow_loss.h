// common/train/flow_loss.h - one batch through the model to its loss.
#pragma once
#include <ATen/core/Tensor.h>

#include "common/models/flux/transformer.h"
#include "common/train/loss.h"

namespace flux {

/// One batch as the model's loss takes it; latents and noise float32, everything on the model's
/// device.
struct FlowInputs {
  at::Tensor latents, noise;    // [B, 16, h, w]
  at::Tensor sigma;             // [B] float32
  at::Tensor prompt_embedding;  // [B, L, X]
  at::Tensor pooled_embedding;  // [B, V]
  at::Tensor text_mask{};       // [B, L], or undefined
  at::Tensor loss_mask{};       // [B, 1, h, w] float32 in [0, 1], or undefined: 1
  at::Tensor loss_weight{};     // [B] float32, or undefined: 1
  double guidance = 1;
  at::Tensor input_noise{};  // what the input is noised with, if not `noise`
};

/// A batch noised to its sigma, as the transformer reads it, and what its output is held against.
struct FlowStep {
  dit::Inputs inputs;
  at::Tensor noisy, target;  // [B, N, 64]
  at::Tensor mask;           // [B, N, 64], or undefined
  at::Tensor sigma;          // [B]
  at::Tensor loss_weight;    // [B], or undefined
};

/// Flow matching: the model sees the latents noised to sigma and must predict noise - latents.
/// Throws std::invalid_argument if shapes disagree.
FlowStep flow_step(const dit::Config& config, const FlowInputs& inputs);

/// loss_per_sample() times weight, [B]: what flow_loss() is the mean of.
at::Tensor flow_losses(const LossOptions& options,
                       const FlowStep& step,
                       const at::Tensor& velocity);

/// The mean over the samples of loss_per_sample() times weight, the target taken as options.prediction takes the output; scalar float32 with its graph.
///   velocity  [B, N, 64] of dit::forward()
at::Tensor flow_loss(const LossOptions& options, const FlowStep& step, const at::Tensor& velocity);

/// Both around dit::forward(): the whole model's graph at once.
at::Tensor flow_loss(const dit::Config& config,
                     const dit::Weights& weights,
                     const LossOptions& options,
                     const FlowInputs& inputs);

}  // namespace flux
