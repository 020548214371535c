#include "common/train/loss.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/pow.h>

#include <numbers>

#include "common/tensor/tensor.h"
#include "common/train/per_sample.h"

namespace flux {
namespace {

// less than one grey level of one latent pixel; only to divide nothing by
constexpr double kSmallestMask = 1e-6;

}  // namespace

at::Tensor model_prediction(Prediction kind,
                            const at::Tensor& output,
                            const at::Tensor& noisy,
                            const at::Tensor& sigma) {
  check_shape("noisy", noisy, output.sizes());
  const at::Tensor raw = output.to(at::kFloat);
  switch (kind) {
    case Prediction::kRaw:
      return raw;
    case Prediction::kAdditive:
      return raw + noisy.to(at::kFloat);
    case Prediction::kSigmaScaled:
      break;
  }
  return noisy.to(at::kFloat) - per_sample(sigma, output) * raw;
}

at::Tensor loss_weights(WeightingScheme scheme, const at::Tensor& sigma) {
  const at::Tensor s = sigma.to(at::kFloat);
  if (scheme == WeightingScheme::kSigmaSqrt) return s.clamp_min(0.001).pow(-2);
  if (scheme == WeightingScheme::kCosmap)
    return 2 / (std::numbers::pi * (1 - 2 * s + 2 * s.square()));
  return at::ones_like(s);
}

at::Tensor element_loss(const LossOptions& options,
                        const at::Tensor& prediction,
                        const at::Tensor& target,
                        const at::Tensor& sigma,
                        const at::Tensor& mask) {
  check_shape("prediction", prediction, target.sizes());
  const at::Tensor d = prediction.to(at::kFloat) - target.to(at::kFloat);
  at::Tensor loss;
  if (options.type == LossType::kL2) {
    loss = d.square();
  } else if (options.type == LossType::kL1) {
    // |d| and its gradient; abs itself does not run on Meta, where plans are made
    loss = d * d.detach().sgn();
  } else {
    const at::Tensor constant = at::full_like(sigma, options.huber_c, at::kFloat);
    at::Tensor scale = constant;
    if (options.huber_schedule == HuberSchedule::kExponential)
      scale = at::pow(constant, sigma.to(at::kFloat));
    if (options.huber_schedule == HuberSchedule::kSnr)
      scale = (1 - sigma.to(at::kFloat)).square() * (1 - options.huber_c) + options.huber_c;
    const at::Tensor c = per_sample(scale * options.huber_scale, d);
    loss = 2 * ((d.square() + c.square()).sqrt() - c);
    if (options.type == LossType::kHuber) loss = loss * c;
  }
  if (mask.defined()) {
    check_shape("mask", mask, target.sizes());
    loss = loss * mask;
    if (options.renormalise_mask)
      return loss.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp_min(kSmallestMask);
  }
  return loss.flatten(1).mean(1);
}

at::Tensor loss_per_sample(const LossOptions& options,
                           const at::Tensor& output,
                           const at::Tensor& noisy,
                           const at::Tensor& target,
                           const at::Tensor& sigma,
                           const at::Tensor& mask) {
  const at::Tensor loss = element_loss(
      options, model_prediction(options.prediction, output, noisy, sigma), target, sigma, mask);
  if (options.weighting != WeightingScheme::kSigmaSqrt &&
      options.weighting != WeightingScheme::kCosmap)
    return loss;
  return loss * loss_weights(options.weighting, sigma);
}

}  // namespace flux
