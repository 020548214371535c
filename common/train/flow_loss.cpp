#include "common/train/flow_loss.h"

#include <ATen/ops/full_like.h>

#include <vector>

#include "common/models/flux/packing.h"
#include "common/tensor/tensor.h"
#include "common/train/flow_matching.h"

namespace flux {

at::Tensor flow_loss(const dit::Config& config,
                     const dit::Weights& weights,
                     const LossOptions& options,
                     const FlowInputs& in) {
  const int64_t rows = in.latents.size(2), columns = in.latents.size(3);
  const auto device = in.latents.device();
  const at::Tensor noisy =
      dit::pack_latents(noised_latents(in.latents, in.noise, in.sigma));               // [B, N, 64]
  const at::Tensor target = dit::pack_latents(velocity_target(in.latents, in.noise));  // [B, N, 64]
  at::Tensor mask;
  if (in.loss_mask.defined()) {
    check_shape(
        "loss_mask", in.loss_mask, std::vector<int64_t>{in.latents.size(0), 1, rows, columns});
    mask = dit::pack_latents(in.loss_mask.expand(in.latents.sizes()));  // [B, N, 64]
  }
  dit::Inputs inputs;
  inputs.img = noisy;
  inputs.txt = in.prompt_embedding;
  inputs.y = in.pooled_embedding;
  inputs.timestep = in.sigma;
  if (config.guidance) inputs.guidance = at::full_like(in.sigma, in.guidance);
  inputs.img_ids = dit::image_ids(rows, columns).to(device);
  inputs.txt_ids = dit::text_ids(in.prompt_embedding.size(1)).to(device);
  if (in.text_mask.defined()) inputs.text_mask = in.text_mask;
  const at::Tensor output = dit::forward(config, weights, inputs);  // [B, N, 64]
  const at::Tensor loss = loss_per_sample(options, output, noisy, target, in.sigma, mask);
  return in.loss_weight.defined() ? (loss * in.loss_weight).mean() : loss.mean();
}

}  // namespace flux
