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

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/train/flow_loss.h"
#include "pipelines/train/ranks.h"

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

/// The losses of `parts`, which pass through the model together, one behind the other.
std::vector<double> losses_of(Session& session,
                              std::span<const Part> parts,
                              const std::vector<double>& sigmas) {
  const TrainingData& data = *session.data;
  std::vector<FlowInputs> inputs;
  Batch batch;  // tensors are shared
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    const bool same = i > 0 && parts[i - 1].batch == part.batch;
    if (!same) batch = data.load_held_out(part.batch);
    FlowInputs of_part = same ? inputs.back() : on_device(session, batch);
    of_part.noise = data.held_out_noise(batch, static_cast<int64_t>(part.sigma)).to(session.device);
    of_part.sigma = at::full(
        {batch.size()}, sigmas[part.sigma], at::TensorOptions(session.device).dtype(at::kFloat));
    inputs.push_back(std::move(of_part));
  }
  return session.trainer->evaluate(inputs);
}

/// Of samples whose loss is not finite.
[[noreturn]] void refuse(const Session& session, const std::set<std::string>& bad) {
  const std::vector<std::string> names(bad.begin(), bad.end());
  throw CommonFailure(fmt::format("step {}: the validation loss is not finite, on {}",
                                  session.step,
                                  join_some(names, names.size())),
                      "make their caches anew if their cached values are not finite; else start "
                      "again with a lower --learning-rate");
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
  const int64_t world = session.options.launch.world;
  // where nothing streams, one at a time is as fast
  int64_t batches = streams ? std::min((parts + world - 1) / world, kMostBatches) : 1;
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
  // part j is rank j mod world's; ranks may have planned for other numbers of them at a time
  const auto world = static_cast<size_t>(session.options.launch.world),
             rank = static_cast<size_t>(session.options.launch.rank);
  std::vector<Part> own;
  for (size_t j = rank; j < parts.size(); j += world) own.push_back(parts[j]);
  size_t at_once = parts.size();
  for (const auto& its : gather_numbers(session, {session.validation_batches}))
    at_once = std::min(at_once, static_cast<size_t>(its[0]));
  const size_t most = (parts.size() + world - 1) / world;  // of a rank
  std::vector<double> own_losses;
  for (size_t i = 0; i < most; i += at_once) {
    if (agreed_stop(session)) return std::nullopt;
    const size_t first = std::min(i, own.size());
    const auto losses = losses_of(
        session, std::span(own).subspan(first, std::min(at_once, own.size() - first)), out.sigmas);
    own_losses.insert(own_losses.end(), losses.begin(), losses.end());
  }
  const auto losses = gather_values<double>(session, own_losses);
  // in the order of parts, whoever computed them
  std::vector<size_t> next(world);
  std::set<std::string> bad;
  for (size_t j = 0; j < parts.size(); ++j) {
    const auto& its = losses[j % world];
    for (int64_t i = 0; i < session.data->held_out_batch_size(parts[j].batch); ++i) {
      const double loss = its.at(next[j % world]++);
      out.losses[parts[j].sigma] += loss;
      if (!std::isfinite(loss))
        bad.insert(
            show(session.data->load_held_out(parts[j].batch).names.at(static_cast<size_t>(i))));
    }
  }
  if (!bad.empty()) refuse(session, bad);
  for (double& loss : out.losses) {
    loss /= static_cast<double>(out.samples);
    out.loss += loss / static_cast<double>(out.losses.size());
  }
  out.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return out;
}

}  // namespace flux::train
