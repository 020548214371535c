#include "pipelines/train/step.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <vector>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/rng.h"
#include "common/core/text.h"
#include "common/tensor/tensor.h"
#include "common/tensor/weight_file.h"
#include "common/train/flow_loss.h"
#include "pipelines/train/dump.h"
#include "pipelines/train/ranks.h"

namespace flux::train {
namespace {

/// Of each sample of each batch of the step.
std::vector<std::vector<double>> draw_sigmas(const Session& session,
                                             std::span<const BatchOutline> outline) {
  const TimestepOptions& options = session.options.timesteps;
  std::vector<SampleKey> keys;
  for (const BatchOutline& batch : outline)
    for (const uint64_t visit : batch.visits)
      keys.push_back({static_cast<uint64_t>(batch.epoch), visit});
  const std::vector<double> draws = timestep_uniforms(options.stratified,
                                                      static_cast<uint64_t>(session.options.seed),
                                                      static_cast<uint64_t>(session.step),
                                                      keys);
  std::vector<std::vector<double>> out;
  size_t next = 0;
  for (const BatchOutline& batch : outline) {
    const int64_t num_tokens = batch.height / 2 * (batch.width / 2);
    out.emplace_back();
    for (int64_t i = 0; i < batch.size(); ++i)
      out.back().push_back(static_cast<float>(sampled_sigma(options, draws[next++], num_tokens)));
  }
  return out;
}

/// [B]
at::Tensor sigma_tensor(const std::vector<double>& sigmas) {
  const std::vector<float> values(sigmas.begin(), sigmas.end());
  return from_values<float>(values, std::vector<int64_t>{static_cast<int64_t>(values.size())});
}

/// What of the weights that the run began with is not finite; looked for when it is known to matter, for a file of 24 GB
/// takes a while.
std::string spoilt_weight(const Session& session) {
  for (const auto& [name, tensor] : read_weights(session.file->path()).tensors) {
    // 8-bit types have no isfinite()
    const bool small = at::isFloatingType(tensor.scalar_type()) && tensor.element_size() == 1;
    const at::Tensor values = small ? tensor.to(at::kFloat) : tensor;
    if (!values.isfinite().all().item<bool>()) return name;
  }
  return {};
}

/// With the command that makes the step again; nothing if the disk has no room for it.
std::string dumped(Session& session,
                   std::span<const Batch> batches,
                   std::span<const FlowInputs> inputs,
                   const engine::NotFinite& reason) {
  if (session.group) return "\n  one rank with as many batches an update leaves the step in a file";
  try {
    const auto path = dump_step(session, batches, inputs, reason);
    return fmt::format(
        "\n  the step is in {}; flux-train --config {} --reproduce {} makes it again",
        show(path),
        show(session.options.out / "run.toml"),
        show(path));
  } catch (const ResourceError& error) {
    log::warn("the step could not be saved: {}", error.what());
    return {};
  }
}

[[noreturn]] void refuse_not_finite(Session& session,
                                    std::span<const Batch> batches,
                                    std::span<const FlowInputs> inputs,
                                    const engine::NotFinite& reason) {
  const std::string dump = dumped(session, batches, inputs, reason);
  std::vector<std::string> names;
  bool data = false;
  for (const Batch& batch : batches) {
    for (const std::string& name : batch.names) names.push_back(show(name));
    data = data || !batch.latents.isfinite().all().item<bool>() ||
           !batch.prompt_embedding.isfinite().all().item<bool>() ||
           !batch.pooled_embedding.isfinite().all().item<bool>();
  }
  if (const std::string name = data ? "" : spoilt_weight(session); !name.empty())
    throw CommonFailure(
        fmt::format("{}: tensor '{}' has values that are not finite (step {}: {}){}",
                    show(session.file->path()),
                    printable(name),
                    session.step + 1,
                    reason.what(),
                    dump),
        "the file is damaged: download or convert it again");
  throw CommonFailure(
      fmt::format("step {}: {}, on {}{}",
                  session.step + 1,
                  reason.what(),
                  join_some(names, names.size()),
                  dump),
      data ? "the cached values of these samples are not finite: make their caches "
             "anew"
           : "start again with a lower --learning-rate, or with --max-grad-norm if that was off");
}

FlowInputs on_device(const Session& session, const Batch& batch, const at::Tensor& sigma) {
  const auto moved = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.to(session.device) : tensor;
  };
  return {.latents = moved(batch.latents),
          .noise = moved(batch.noise),
          .sigma = moved(sigma),
          .prompt_embedding = moved(batch.prompt_embedding),
          .pooled_embedding = moved(batch.pooled_embedding),
          .text_mask = moved(batch.text_mask),
          .loss_mask = moved(batch.loss_mask),
          .loss_weight = moved(batch.loss_weight),
          .guidance = session.guidance(),
          .input_noise = moved(batch.input_noise)};
}

}  // namespace

StepResult train_step(Session& session,
                      std::span<const Batch> batches,
                      std::span<const BatchOutline> outline) {
  const auto world = static_cast<size_t>(session.options.launch.world);
  const auto rank = static_cast<size_t>(session.options.launch.rank);
  const auto sigmas = draw_sigmas(session, outline);
  StepResult result;
  std::vector<int64_t> batch_sizes;
  for (const auto& of_batch : sigmas) {
    result.sigma.insert(result.sigma.end(), of_batch.begin(), of_batch.end());
    batch_sizes.push_back(static_cast<int64_t>(of_batch.size()));
  }
  std::vector<FlowInputs> inputs;
  for (size_t i = 0; i < batches.size(); ++i)
    inputs.push_back(on_device(session, batches[i], sigma_tensor(sigmas[i * world + rank])));
  result.learning_rate = learning_rate(session.options.effective_lr(), session.step);
  try {
    const auto trained =
        session.trainer->step(inputs, session.step + 1, result.learning_rate, batch_sizes);
    result.loss = trained.loss;
    result.grad_norm = trained.grad_norm;
    result.sample_loss = trained.sample_losses;
  } catch (const engine::NotFinite& reason) {
    refuse_not_finite(session, batches, inputs, reason);
  }
  ++session.step;
  return result;
}

}  // namespace flux::train
