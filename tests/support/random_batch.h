// tests/support/random_batch.h - a batch of random values for a step of a given shape.
#pragma once
#include <ATen/ATen.h>

#include "common/engine/plan.h"
#include "common/tensor/memory.h"
#include "common/train/flow_loss.h"

namespace flux::test {

/// Masks and the noise of the input where the shape has them; half of the text is masked.
inline FlowInputs random_batch(const dit::Config& config, const engine::StepShape& s) {
  const MemoryScope scope(MemoryCause::kData);
  FlowInputs in;
  in.latents = at::randn({s.batch, config.in_channels / 4, s.height / 8, s.width / 8});
  in.noise = at::randn(in.latents.sizes());
  in.sigma = at::full({s.batch}, 0.5);
  in.prompt_embedding = at::randn({s.batch, s.text_length, config.prompt_dim}).to(s.text_type);
  in.pooled_embedding = at::randn({s.batch, config.pooled_dim}).to(s.text_type);
  in.loss_weight = at::full({s.batch}, 1.0);
  if (s.text_mask) {
    in.text_mask = at::ones({s.batch, s.text_length}, at::kBool);
    in.text_mask.narrow(1, s.text_length / 2, s.text_length / 2).fill_(false);
  }
  if (s.input_noise) in.input_noise = at::randn(in.latents.sizes());
  if (s.loss_mask) in.loss_mask = at::rand({s.batch, 1, s.height / 8, s.width / 8});
  return in;
}

}  // namespace flux::test
