// A LoRA learns four fixed samples by heart: forward, backward, clipping and AdamW work together.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "common/models/flux/load.h"
#include "common/models/lora/lora.h"
#include "common/optim/adamw.h"
#include "common/train/gradient_clip.h"
#include "pipelines/train/step.h"
#include "tests/support/tiny_flux.h"

namespace flux::train {
namespace {

at::Tensor normal(at::IntArrayRef shape, uint64_t number) {
  at::Tensor out = at::empty(shape, at::kFloat);
  RandomStream(3, Purpose::kNoise, number)
      .fill_normal({out.mutable_data_ptr<float>(), static_cast<size_t>(out.numel())});
  return out;
}

TEST(Overfitting, LoraBringsTheLossBelow15PercentWithin300Steps) {
  const dit::Config config = test::tiny_flux_config();
  dit::Weights weights = dit::make_weights(config, test::tiny_flux(config, 1), at::kFloat);
  const FlowInputs fixed{.latents = normal({4, 16, 4, 4}, 0),
                         .noise = normal({4, 16, 4, 4}, 1),
                         .sigma = at::tensor({0.2f, 0.45f, 0.7f, 0.9f}),
                         .prompt_embedding = normal({4, 8, 16}, 2),
                         .pooled_embedding = normal({4, 8}, 3),
                         .text_mask = {},
                         .loss_weight = {}};
  const double base = flow_loss(config, weights, {}, fixed).item<double>();

  lora::Adapters adapters = lora::make_adapters(lora::default_targets(config), 16, 16, 1);
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
      adamw_step(value.detach(), gradients[i], m, v, 1e-2, {}, step);
      value.mutable_grad() = at::Tensor();
    }
  }
  EXPECT_LT(loss, 0.15 * base) << "start " << base;
}

}  // namespace
}  // namespace flux::train
