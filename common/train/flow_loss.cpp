#include "common/train/flow_loss.h"

#include <ATen/ops/full_like.h>

#include <vector>

#include "common/models/flux/packing.h"
#include "common/tensor/tensor.h"
#include "common/train/flow_matching.h"

namespace flux {

FlowStep flow_step(const dit::Config& config, const FlowInputs& in) {
  const int64_t rows = in.latents.size(2), columns = in.latents.size(3);
  const auto device = in.latents.device();
  FlowStep step;
  step.sigma = in.sigma;
  step.loss_weight = in.loss_weight;
  step.noisy = dit::pack_latents(
      noised_latents(in.latents, in.input_noise.defined() ? in.input_noise : in.noise, in.sigma));
  step.target = dit::pack_latents(velocity_target(in.latents, in.noise));
  if (in.loss_mask.defined()) {
    check_shape(
        "loss_mask", in.loss_mask, std::vector<int64_t>{in.latents.size(0), 1, rows, columns});
    step.mask = dit::pack_latents(in.loss_mask.expand(in.latents.sizes()));
  }
  dit::Inputs& inputs = step.inputs;
  inputs.img = step.noisy;
  inputs.txt = in.prompt_embedding;
  inputs.y = in.pooled_embedding;
  inputs.timestep = in.sigma;
  if (config.guidance) inputs.guidance = at::full_like(in.sigma, in.guidance);
  inputs.img_ids = dit::image_ids(rows, columns).to(device);
  inputs.txt_ids = dit::text_ids(in.prompt_embedding.size(1)).to(device);
  if (in.text_mask.defined()) inputs.text_mask = in.text_mask;
  return step;
}

at::Tensor flow_losses(const LossOptions& options,
                       const FlowStep& step,
                       const at::Tensor& velocity) {
  const at::Tensor target =
      options.prediction == Prediction::kRaw
          ? step.target
          : model_prediction(options.prediction, step.target, step.noisy, step.sigma);
  const at::Tensor loss =
      loss_per_sample(options, velocity, step.noisy, target, step.sigma, step.mask);
  return step.loss_weight.defined() ? loss * step.loss_weight : loss;
}

at::Tensor flow_loss(const LossOptions& options, const FlowStep& step, const at::Tensor& velocity) {
  return flow_losses(options, step, velocity).mean();
}

at::Tensor flow_loss(const dit::Config& config,
                     const dit::Weights& weights,
                     const LossOptions& options,
                     const FlowInputs& in) {
  const FlowStep step = flow_step(config, in);
  return flow_loss(options, step, dit::forward(config, weights, step.inputs));
}

}  // namespace flux
