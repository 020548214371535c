#include "pipelines/train/step.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>
#include <fmt/format.h>

#include <cmath>
#include <vector>

#include "common/core/error.h"
#include "common/core/rng.h"
#include "common/core/text.h"
#include "common/optim/adamw.h"
#include "common/tensor/tensor.h"
#include "common/train/flow_loss.h"
#include "common/train/gradient_clip.h"

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
                                    const Batch& batch,
                                    double loss,
                                    double grad_norm) {
  std::vector<std::string> names;
  for (const std::string& name : batch.names) names.push_back(show(name));
  const bool data = !batch.latents.isfinite().all().item<bool>() ||
                    !batch.prompt_embedding.isfinite().all().item<bool>() ||
                    !batch.pooled_embedding.isfinite().all().item<bool>();
  throw InputError(
      fmt::format("step {}: loss is {}, gradient norm {}, on {}",
                  session.step + 1,
                  loss,
                  grad_norm,
                  join_some(names, names.size())),
      data ? "the cached values of these samples are not finite: make their caches "
             "anew"
           : "start again with a lower --learning-rate, or with --max-grad-norm if that was off");
}

}  // namespace

StepResult train_step(Session& session, const Batch& batch) {
  const auto on_device = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.to(session.device) : tensor;
  };
  const at::Tensor loss = flow_loss(session.model.config,
                                    session.model.weights,
                                    session.options.loss,
                                    {.latents = on_device(batch.latents),
                                     .noise = on_device(batch.noise),
                                     .sigma = on_device(draw_sigmas(session, batch)),
                                     .prompt_embedding = on_device(batch.prompt_embedding),
                                     .pooled_embedding = on_device(batch.pooled_embedding),
                                     .text_mask = on_device(batch.text_mask),
                                     .loss_mask = on_device(batch.loss_mask),
                                     .loss_weight = on_device(batch.loss_weight),
                                     .guidance = session.guidance()});
  loss.backward();

  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> gradients;
  for (const Parameter& parameter : session.parameters) {
    // none reaches the text half of the last double block of a model without single blocks
    const at::Tensor& gradient = parameter.value.grad();
    gradients.push_back(gradient.defined() ? gradient : at::zeros_like(parameter.value));
    parameter.value.mutable_grad() =
        at::Tensor();  // freed with `gradients`, at the end of this step
  }
  LrOptions lr = session.options.lr;
  lr.num_steps = session.options.max_steps;
  StepResult result{loss.item<double>(), 0, learning_rate(lr, session.step)};
  result.grad_norm = global_norm(gradients);
  if (!std::isfinite(result.loss) || !std::isfinite(result.grad_norm)) {
    refuse_not_finite(session, batch, result.loss, result.grad_norm);
  }
  clip_to_norm(gradients, result.grad_norm, session.options.max_grad_norm);
  ++session.step;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Parameter& p = session.parameters[i];
    adamw_step(p.value.detach(),
               gradients[i],
               p.exp_avg,
               p.exp_avg_sq,
               result.learning_rate,
               {.weight_decay = session.options.weight_decay},
               session.step);
  }
  return result;
}

}  // namespace flux::train
