#include "common/train/loss.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/pow.h>

#include <numbers>
#include <optional>

#include "common/ops/loss.h"
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
  if (kind == Prediction::kRaw) return output;
  const at::Tensor raw = output.to(at::kFloat);
  if (kind == Prediction::kAdditive) return raw + noisy.to(at::kFloat);
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
  if (mask.defined()) check_shape("mask", mask, target.sizes());
  const at::Tensor s = sigma.to(at::kFloat);
  at::Tensor c = at::full_like(s, options.huber_c);
  if (options.huber_schedule == HuberSchedule::kExponential) c = at::pow(c, s);
  if (options.huber_schedule == HuberSchedule::kSnr)
    c = (1 - s).square() * (1 - options.huber_c) + options.huber_c;
  const auto rows = [](const at::Tensor& x) {
    return x.dim() == 3 ? x : x.flatten(1).unsqueeze(1);
  };
  const at::Tensor sums =
      loss_sums(options.type,
                rows(prediction),
                rows(target.to(at::kFloat)),
                c * options.huber_scale,
                mask.defined() ? std::optional(rows(mask.to(at::kFloat))) : std::nullopt);
  if (mask.defined() && options.renormalise_mask)
    return sums / mask.flatten(1).sum(1).clamp_min(kSmallestMask);
  return sums / static_cast<double>(prediction.numel() / prediction.size(0));
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
