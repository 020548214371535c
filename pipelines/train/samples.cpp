#include "pipelines/train/samples.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/data/stored_picture.h"
#include "common/tensor/memory.h"
#include "common/train/euler.h"
#include "common/train/sampler.h"
#include "formats/cache/folder.h"
#include "formats/samples/samples.h"

namespace flux::train {
namespace {

/// Pictures that pass through a block while it is there.
constexpr int64_t kTogether = 4;

int64_t sample_steps(const Session& session) {
  return session.options.sample_steps.value_or(session.config.guidance ? 20 : 4);
}

std::pair<int64_t, int64_t> sample_size(const Session& session) {
  const Options& o = session.options;
  if (o.sample_width > 0) return {o.sample_width, o.sample_height};
  std::pair<int64_t, int64_t> largest{0, 0};
  for (const auto& [width, height, visits] : session.data->buckets())
    if (width * height > largest.first * largest.second) largest = {width, height};
  return {largest.first / 16 * 16, largest.second / 16 * 16};
}

nlohmann::json settings_json(const Session& session) {
  const Options& o = session.options;
  nlohmann::json out{{"model", printable(o.model.filename().native())},
                     {"schedule", session.config.guidance ? "dev" : "schnell"},
                     {"steps", sample_steps(session)},
                     {"cfg-scale", 1.0},
                     {"step", session.step}};
  if (session.config.guidance) out["guidance"] = o.sample_guidance.value_or(3.5);
  return out;
}

/// Whether the file has these pictures: a resumed run comes by the same step with the same weights.
bool is_made(const std::filesystem::path& path,
             const nlohmann::json& settings,
             const std::vector<samples::Info>& wanted) {
  if (!samples::is_samples_file(path)) return false;
  const samples::File file(path);
  const auto same = [](const samples::Info& a, const samples::Info& b) {
    return a.prompt == b.prompt && a.index == b.index && a.seed == b.seed && a.height == b.height &&
           a.width == b.width;
  };
  return file.header().settings == settings && std::ranges::equal(file.pictures(), wanted, same);
}

}  // namespace

void open_samples(Session& session) {
  const Options& o = session.options;
  if (o.sample_every == 0) return;
  if (o.sample_guidance && !session.config.guidance)
    throw UsageError(
        fmt::format("--sample-guidance has no effect: {} has no guidance input", show(o.model)),
        "leave it out");
  session.prompts = std::make_unique<Prompts>(o.prompts);
  session.prompts->require_fit(
      o.model, session.config.prompt_dim, session.config.pooled_dim, session.config.guidance);
}

std::optional<engine::SampleShape> sample_shape(const Session& session) {
  if (!session.prompts) return std::nullopt;
  const auto [width, height] = sample_size(session);
  const Prompts& prompts = *session.prompts;
  return engine::SampleShape{
      .batch = std::min(kTogether, std::ssize(prompts.all()) * session.options.sample_count),
      .width = width,
      .height = height,
      .text_length = prompts.t5_length(),
      .text_mask = prompts.masked(),
      .text_type = prompts.type()};
}

void sample_if_due(Session& session) {
  const Options& o = session.options;
  if (!session.prompts || session.step == 0 || session.step % o.sample_every != 0 ||
      cancel::requested())
    return;
  const Prompts& prompts = *session.prompts;
  const auto [width, height] = sample_size(session);
  struct Wanted {
    const Prompt* prompt;
    samples::Info info;
  };
  std::vector<Wanted> wanted;
  std::vector<samples::Info> infos;
  for (const Prompt& prompt : prompts.all())
    for (int64_t i = 0; i < o.sample_count; ++i) {
      infos.push_back({.prompt = prompt.text,
                       .negative = {},
                       .prompt_number = static_cast<uint64_t>(prompt.number),
                       .index = static_cast<uint64_t>(i),
                       .seed = static_cast<uint64_t>(o.sample_seed),
                       .height = static_cast<uint32_t>(height / 8),
                       .width = static_cast<uint32_t>(width / 8)});
      wanted.push_back({&prompt, infos.back()});
    }
  const auto path = o.out / "samples" / fmt::format("step-{:06}.h5", session.step);
  const samples::Header header{.settings = settings_json(session),
                               .provenance = {"flux-train",
                                              std::string(tool_version()),
                                              o.command_line,
                                              session.device.str()},
                               .created = cache::utc_now()};
  if (is_made(path, header.settings, infos)) return;
  const EulerOptions euler{
      .sigmas = sampler_schedule(
          sample_steps(session), width / 16 * (height / 16), session.config.guidance),
      .guidance = o.sample_guidance.value_or(3.5)};
  const auto moved = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.to(session.device) : tensor;
  };
  std::vector<samples::Record> records;
  Progress progress("sampling", "pictures", std::ssize(wanted));
  for (size_t first = 0; first < wanted.size(); first += kTogether) {
    const size_t last = std::min(wanted.size(), first + kTogether);
    std::vector<SampleInputs> inputs;
    for (size_t i = first; i < last; ++i) {
      const MemoryScope scope(MemoryCause::kData);
      const PromptEmbedding text = prompts.load(*wanted[i].prompt);
      inputs.push_back({.noise = moved(sample_noise(wanted[i].info.seed,
                                                    wanted[i].prompt->id,
                                                    wanted[i].info.index,
                                                    samples::kChannels,
                                                    height / 8,
                                                    width / 8)),
                        .prompt_embedding = moved(text.prompt),
                        .pooled_embedding = moved(text.pooled),
                        .text_mask = moved(text.mask)});
    }
    std::vector<at::Tensor> latents;
    try {
      latents = euler_sample(
          [&](std::span<const dit::Inputs> all) {
            cancel::check();
            return session.trainer->predict(all);
          },
          euler,
          inputs);
    } catch (const Interrupted&) {
      return;
    }
    for (size_t i = first; i < last; ++i)
      records.push_back(stored_picture(latents[i - first],
                                       *wanted[i].prompt,
                                       static_cast<int64_t>(wanted[i].info.index),
                                       o.sample_seed,
                                       {}));
    progress.update(static_cast<int64_t>(last));
  }
  const auto bytes = samples::encode(header, records);
  make_folder(path.parent_path());
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
  log::info("step {}: {} pictures sampled, {}", session.step, records.size(), show(path));
}

}  // namespace flux::train
