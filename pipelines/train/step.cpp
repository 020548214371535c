#include "pipelines/train/step.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <vector>

#include "common/core/error.h"
#include "common/core/rng.h"
#include "common/core/text.h"
#include "common/tensor/tensor.h"
#include "common/train/flow_loss.h"

namespace flux::train {
namespace {

at::Tensor draw_sigmas(const Session& session, const Batch& batch) {
  const int64_t num_tokens = batch.latents.size(2) / 2 * (batch.latents.size(3) / 2);
  std::vector<float> sigmas;
  for (const uint64_t visit : batch.visits) {
    const RandomStream stream(static_cast<uint64_t>(session.options.seed),
                              Purpose::kTimestep,
                              static_cast<uint64_t>(batch.epoch),
                              visit);
    sigmas.push_back(
        static_cast<float>(sampled_sigma(session.options.timesteps, stream, num_tokens)));
  }
  return from_values<float>(sigmas, std::vector<int64_t>{batch.size()});
}

[[noreturn]] void refuse_not_finite(const Session& session,
                                    std::span<const Batch> batches,
                                    const engine::NotFinite& reason) {
  std::vector<std::string> names;
  bool data = false;
  for (const Batch& batch : batches) {
    for (const std::string& name : batch.names) names.push_back(show(name));
    data = data || !batch.latents.isfinite().all().item<bool>() ||
           !batch.prompt_embedding.isfinite().all().item<bool>() ||
           !batch.pooled_embedding.isfinite().all().item<bool>();
  }
  throw InputError(
      fmt::format(
          "step {}: {}, on {}", session.step + 1, reason.what(), join_some(names, names.size())),
      data ? "the cached values of these samples are not finite: make their caches "
             "anew"
           : "start again with a lower --learning-rate, or with --max-grad-norm if that was off");
}

FlowInputs on_device(const Session& session, const Batch& batch) {
  const auto moved = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.to(session.device) : tensor;
  };
  return {.latents = moved(batch.latents),
          .noise = moved(batch.noise),
          .sigma = moved(draw_sigmas(session, batch)),
          .prompt_embedding = moved(batch.prompt_embedding),
          .pooled_embedding = moved(batch.pooled_embedding),
          .text_mask = moved(batch.text_mask),
          .loss_mask = moved(batch.loss_mask),
          .loss_weight = moved(batch.loss_weight),
          .guidance = session.guidance()};
}

}  // namespace

StepResult train_step(Session& session, std::span<const Batch> batches) {
  std::vector<FlowInputs> inputs;
  for (const Batch& batch : batches) inputs.push_back(on_device(session, batch));
  LrOptions lr = session.options.lr;
  lr.num_steps = session.options.max_steps;
  StepResult result;
  result.learning_rate = learning_rate(lr, session.step);
  try {
    const auto trained = session.trainer->step(inputs, session.step + 1, result.learning_rate);
    result.loss = trained.loss;
    result.grad_norm = trained.grad_norm;
  } catch (const engine::NotFinite& reason) {
    refuse_not_finite(session, batches, reason);
  }
  ++session.step;
  return result;
}

}  // namespace flux::train
