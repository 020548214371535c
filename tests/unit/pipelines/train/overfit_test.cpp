// A LoRA learns four fixed samples by heart: forward, backward, clipping and AdamW work together.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "common/models/flux/load.h"
#include "common/models/flux/packing.h"
#include "common/models/lora/lora.h"
#include "common/optim/adamw.h"
#include "common/train/flow_loss.h"
#include "common/train/flow_matching.h"
#include "common/train/gradient_clip.h"
#include "pipelines/model/tiny.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/tiny_flux.h"

namespace flux::train {
namespace {

at::Tensor normal(at::IntArrayRef shape, uint64_t number) {
  at::Tensor out = at::empty(shape, at::kFloat);
  RandomStream(3, Purpose::kNoise, number)
      .fill_normal({out.mutable_data_ptr<float>(), static_cast<size_t>(out.numel())});
  return out;
}

/// The last loss of 300 steps on four fixed (latents, text, noise, sigma), as a share of the base model's.
double share_after_300_steps(const dit::Config& config,
                             dit::Weights weights,
                             double learning_rate) {
  const FlowInputs fixed{.latents = normal({4, 16, 4, 4}, 0),
                         .noise = normal({4, 16, 4, 4}, 1),
                         .sigma = at::tensor({0.2f, 0.45f, 0.7f, 0.9f}),
                         .prompt_embedding = normal({4, 8, config.prompt_dim}, 2),
                         .pooled_embedding = normal({4, config.pooled_dim}, 3)};
  const double base = flow_loss(config, weights, {}, fixed).item<double>();

  lora::Adapters adapters = lora::make_adapters(lora::with_rank(lora::default_targets(config), 16, 16), 1);
  std::vector<std::array<at::Tensor, 3>> parameters;  // value, moments
  for (lora::Module& module : adapters.modules) {
    for (const at::Tensor& tensor : {module.down, module.up}) {
      parameters.push_back(
          {tensor.requires_grad_(true), at::zeros_like(tensor), at::zeros_like(tensor)});
    }
  }
  lora::attach(adapters, weights);
  double loss = 0;
  for (int64_t step = 1; step <= 300; ++step) {
    const at::Tensor graph = flow_loss(config, weights, {}, fixed);
    loss = graph.item<double>();
    if (step == 1) {
      EXPECT_EQ(loss, base);  // ups are zero
    }
    graph.backward();
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> gradients;
    for (const auto& [value, m, v] : parameters) gradients.push_back(value.grad());
    clip_global_norm(gradients, 1);
    for (size_t i = 0; i < parameters.size(); ++i) {
      const auto& [value, m, v] = parameters[i];
      adamw_step(value.detach(), gradients[i], m, v, learning_rate, {}, step);
      value.mutable_grad() = at::Tensor();
    }
  }
  return loss / base;
}

TEST(FlowLoss, MasksTheElementsOfTheirOwnPixels) {
  const dit::Config config = test::tiny_flux_config();
  const dit::Weights weights = dit::make_weights(config, test::tiny_flux(config, 1), at::kFloat);
  FlowInputs in{.latents = normal({2, 16, 4, 6}, 0),
                .noise = normal({2, 16, 4, 6}, 1),
                .sigma = at::tensor({0.2f, 0.7f}),
                .prompt_embedding = normal({2, 8, config.prompt_dim}, 2),
                .pooled_embedding = normal({2, config.pooled_dim}, 3)};
  const at::NoGradGuard no_grad;
  const double plain = flow_loss(config, weights, {}, in).item<double>();
  in.loss_mask = at::ones({2, 1, 4, 6});
  EXPECT_EQ(flow_loss(config, weights, {}, in).item<double>(), plain);
  in.loss_mask = normal({2, 1, 4, 6}, 4).abs().clamp_max(1);
  // the same from the unpacked output
  dit::Inputs inputs;
  inputs.img = dit::pack_latents(noised_latents(in.latents, in.noise, in.sigma));
  inputs.txt = in.prompt_embedding, inputs.y = in.pooled_embedding, inputs.timestep = in.sigma;
  inputs.guidance = at::ones({2});
  inputs.img_ids = dit::image_ids(4, 6), inputs.txt_ids = dit::text_ids(8);
  const at::Tensor output = dit::unpack_latents(dit::forward(config, weights, inputs), 4, 6);
  const at::Tensor each = (output - velocity_target(in.latents, in.noise)).square() * in.loss_mask;
  const double expected = each.mean().item<double>();
  EXPECT_NEAR(flow_loss(config, weights, {}, in).item<double>(), expected, 1e-6 * expected);
  in.loss_mask = at::ones({2, 1, 4, 4});
  EXPECT_THROW(flow_loss(config, weights, {}, in), std::invalid_argument);
}

TEST(Overfitting, LoraBringsTheLossBelow15PercentWithin300Steps) {
  const dit::Config config = test::tiny_flux_config();
  EXPECT_LT(share_after_300_steps(
                config, dit::make_weights(config, test::tiny_flux(config, 1), at::kFloat), 1e-2),
            0.15);
}

TEST(Overfitting, AndOfTheModelThatFluxModelTinyMakes) {
  const test::TemporaryFolder folder;
  model::tiny({.out = folder.path(), .seed = 1});
  const dit::Model model = dit::load_model(folder / "flux.safetensors", at::kFloat);
  EXPECT_LT(share_after_300_steps(model.config, model.weights, 2e-3), 0.15);
}

}  // namespace
}  // namespace flux::train
