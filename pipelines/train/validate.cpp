#include "pipelines/train/validate.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/text.h"
#include "common/train/flow_loss.h"

namespace flux::train {
namespace {

/// Of batches that pass through the model at a time. Weights that stream are read once for all of them, so more make the
/// reading cheaper still, and planning dearer.
constexpr int64_t kMostBatches = 32;

/// One held-out batch at one noise level.
struct Part {
  int64_t batch = 0;
  size_t sigma = 0;
};

FlowInputs on_device(const Session& session, const Batch& batch) {
  const auto moved = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.to(session.device) : tensor;
  };
  return {.latents = moved(batch.latents),
          .noise = {},
          .sigma = {},
          .prompt_embedding = moved(batch.prompt_embedding),
          .pooled_embedding = moved(batch.pooled_embedding),
          .text_mask = moved(batch.text_mask),
          .loss_mask = moved(batch.loss_mask),
          .guidance = session.guidance()};
}

/// Those of `parts` through the model together; adds up losses by noise level.
void add_losses(Session& session,
                std::span<const Part> parts,
                const std::vector<double>& sigmas,
                std::vector<double>& sums) {
  const TrainingData& data = *session.data;
  std::vector<FlowInputs> inputs;
  std::vector<Batch> batches;  // of each part; tensors are shared
  for (const Part& part : parts) {
    const bool same = !inputs.empty() && batches.back().index == part.batch;
    batches.push_back(same ? batches.back() : data.load_held_out(part.batch));
    FlowInputs of_part = same ? inputs.back() : on_device(session, batches.back());
    of_part.noise =
        data.held_out_noise(batches.back(), static_cast<int64_t>(part.sigma)).to(session.device);
    of_part.sigma = at::full({batches.back().size()},
                             sigmas[part.sigma],
                             at::TensorOptions(session.device).dtype(at::kFloat));
    inputs.push_back(std::move(of_part));
  }
  const std::vector<double> losses = session.trainer->evaluate(inputs);
  std::set<std::string> bad;
  size_t next = 0;
  for (size_t i = 0; i < parts.size(); ++i)
    for (const std::string& name : batches[i].names) {
      const double loss = losses.at(next++);
      if (!std::isfinite(loss)) bad.insert(show(name));
      sums[parts[i].sigma] += loss;
    }
  if (!bad.empty()) {
    const std::vector<std::string> names(bad.begin(), bad.end());
    throw InputError(fmt::format("step {}: the validation loss is not finite, on {}",
                                 session.step,
                                 join_some(names, names.size())),
                     "make their caches anew if their cached values are not finite; else start "
                     "again with a lower --learning-rate");
  }
}

}  // namespace

bool validates(const Session& session) {
  return session.data->num_held_out_batches() > 0 && !session.options.no_validation;
}

void plan_validation(Session& session,
                     const engine::TrainerOptions& wanted,
                     const engine::StepShape& shape) {
  const int64_t blocks = session.config.num_double_blocks + session.config.num_single_blocks;
  const bool streams =
      wanted.residency.resident_blocks >= 0 && wanted.residency.resident_blocks < blocks;
  const int64_t parts = session.data->num_held_out_batches() *
                        static_cast<int64_t>(session.options.effective_validation_sigmas().size());
  // where nothing streams, one at a time is as fast
  int64_t batches = streams ? std::min(parts, kMostBatches) : 1;
  for (;; batches = (batches + 1) / 2) {
    const auto causes = engine::evaluation_memory(session.config, wanted, shape, batches);
    engine::MemoryPlan with = session.plan;
    with.causes = causes;
    if (with.device_bytes() > session.plan.device_bytes() && batches > 1) continue;
    if (with.device_bytes() > session.plan.device_bytes()) session.plan = with;
    break;
  }
  session.validation_batches = batches;
}

std::optional<Validation> validate(Session& session) {
  const auto start = std::chrono::steady_clock::now();
  Validation out;
  out.step = session.step;
  out.sigmas = session.options.effective_validation_sigmas();
  out.losses.resize(out.sigmas.size());
  out.seed = session.options.validation_seed.value_or(0);
  std::vector<Part> parts;
  for (int64_t batch = 0; batch < session.data->num_held_out_batches(); ++batch)
    for (size_t sigma = 0; sigma < out.sigmas.size(); ++sigma) parts.push_back({batch, sigma});
  out.samples = session.data->num_held_out();
  const auto at_once = static_cast<size_t>(session.validation_batches);
  for (size_t i = 0; i < parts.size(); i += at_once) {
    if (cancel::requested()) return std::nullopt;
    add_losses(session,
               std::span(parts).subspan(i, std::min(at_once, parts.size() - i)),
               out.sigmas,
               out.losses);
  }
  for (double& loss : out.losses) {
    loss /= static_cast<double>(out.samples);
    out.loss += loss / static_cast<double>(out.losses.size());
  }
  out.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return out;
}

}  // namespace flux::train
