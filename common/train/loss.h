// common/train/loss.h - from the model's output to one loss a sample.
#pragma once
#include "common/tensor/fwd.h"
#include "common/train/timesteps.h"

namespace flux {

/// What the model's output is taken for. Only raw is consistent with a pretrained FLUX, whose
/// output is the velocity; the others are sd-scripts' --model_prediction_type, kept to compare with
/// it.
enum class Prediction { kRaw, kAdditive, kSigmaScaled };
enum class LossType { kL2, kL1, kHuber, kSmoothL1 };
enum class HuberSchedule { kConstant, kExponential };

struct LossOptions {
  Prediction prediction = Prediction::kRaw;
  WeightingScheme weighting = WeightingScheme::kNone;  // only with kSigmaScaled, as in sd-scripts
  LossType type = LossType::kL2;
  HuberSchedule huber_schedule = HuberSchedule::kConstant;
  double huber_c = 0.1;
  double huber_scale = 1.0;
};

/// raw: output; additive: output + noisy; sigma_scaled: noisy - sigma * output, an estimate of the
/// latents.
///
///   output, noisy  [B, C, H, W] (or any shape that starts with B), float32|bfloat16
///   sigma          [B] float32
///   returns        shape of output, float32
at::Tensor model_prediction(Prediction kind,
                            const at::Tensor& output,
                            const at::Tensor& noisy,
                            const at::Tensor& sigma);

/// sigma_sqrt: sigma^-2; cosmap: 2 / (pi (1 - 2 sigma + 2 sigma^2)); else 1. [B] float32 -> [B]
/// float32.
at::Tensor loss_weights(WeightingScheme scheme, const at::Tensor& sigma);

/// Mean over all elements of each sample of the element's loss times `mask`, in float32: l2 d^2, l1 |d|, huber 2c (sqrt(d^2 + c^2) -
/// c), smooth_l1 2 (sqrt(d^2 + c^2) - c) with d = prediction - target; c = huber_scale * huber_c,
/// or huber_scale * huber_c^sigma.
///
/// The sum is divided by the number of elements, whatever the mask is, as in sd-scripts.
///
///   prediction, target  [B, ...] of equal shape
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

/// model_prediction, element_loss and, with kSigmaScaled, loss_weights: [B] float32. The loss of a
/// batch is its mean.
at::Tensor loss_per_sample(const LossOptions& options,
                           const at::Tensor& output,
                           const at::Tensor& noisy,
                           const at::Tensor& target,
                           const at::Tensor& sigma,
                           const at::Tensor& mask);

}  // namespace flux
