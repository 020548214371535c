// common/train/loss.h - from the model's output to one loss a sample.
#pragma once
#include "common/ops/loss_type.h"
#include "common/tensor/fwd.h"
#include "common/train/timesteps.h"

namespace flux {

/// What the loss compares; sd-scripts' --model_prediction_type. The model's output is the velocity in all of them, as a
/// pretrained FLUX's is: the target goes through the same formula as the output (flow_loss()), where sd-scripts compares
/// the others with the velocity itself.
enum class Prediction { kRaw, kAdditive, kSigmaScaled };
enum class HuberSchedule { kConstant, kExponential, kSnr };

struct LossOptions {
  Prediction prediction = Prediction::kRaw;
  WeightingScheme weighting = WeightingScheme::kNone;  // see loss_weights()
  LossType type = LossType::kL2;
  HuberSchedule huber_schedule = HuberSchedule::kConstant;
  double huber_c = 0.1;
  double huber_scale = 1.0;
  bool renormalise_mask = false;  // see element_loss()
};

/// raw: output; additive: output + noisy; sigma_scaled: noisy - sigma * output, an estimate of the
/// latents.
///
///   output, noisy  [B, C, H, W] (or any shape that starts with B), float32|bfloat16
///   sigma          [B] float32
///   returns        shape of output, float32; raw: output itself
at::Tensor model_prediction(Prediction kind,
                            const at::Tensor& output,
                            const at::Tensor& noisy,
                            const at::Tensor& sigma);

/// sigma_sqrt: sigma^-2, with sigma at least 0.001, one timestep; cosmap: 2 / (pi (1 - 2 sigma + 2 sigma^2)); else 1.
/// [B] float32 -> [B] float32.
at::Tensor loss_weights(WeightingScheme scheme, const at::Tensor& sigma);

/// Mean over all elements of each sample of the element's loss times `mask`, in float32: l2 d^2, l1 |d|,
/// huber 2c (sqrt(d^2 + c^2) - c), smooth_l1 2 (sqrt(d^2 + c^2) - c) with d = prediction - target and c = huber_scale
/// times: constant huber_c; exponential huber_c^sigma; snr (1 - huber_c) / (1 + r)^2 + huber_c, where r, the ratio of
/// noise to signal, is sigma / (1 - sigma), hence (1 - huber_c) (1 - sigma)^2 + huber_c.
///
/// The sum is divided by the number of elements, whatever the mask is, as in sd-scripts; with renormalise_mask by the sum
/// of the mask, so that a sample counts alike whatever its mask's area (an empty mask: loss 0).
///
///   prediction, target  [B, ...] of equal shape; [B, N, W] are not copied
///   sigma               [B] float32
///   mask                shape of prediction, in [0, 1]; undefined: all ones
///   returns             [B] float32, differentiable in prediction
///
/// Throws std::invalid_argument if shapes disagree.
/// Source: sd-scripts library/train_util.py, conditional_loss, and
/// library/custom_train_functions.py, apply_masked_loss (formulas).
at::Tensor element_loss(const LossOptions& options,
                        const at::Tensor& prediction,
                        const at::Tensor& target,
                        const at::Tensor& sigma,
                        const at::Tensor& mask);

/// model_prediction, element_loss and loss_weights: [B] float32. The loss of a
/// batch is its mean.
at::Tensor loss_per_sample(const LossOptions& options,
                           const at::Tensor& output,
                           const at::Tensor& noisy,
                           const at::Tensor& target,
                           const at::Tensor& sigma,
                           const at::Tensor& mask);

}  // namespace flux
