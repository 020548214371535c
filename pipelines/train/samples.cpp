#include "pipelines/train/samples.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/data/stored_picture.h"
#include "common/tensor/memory.h"
#include "common/tensor/tensor.h"
#include "common/train/euler.h"
#include "common/train/sampler.h"
#include "formats/cache/folder.h"
#include "formats/samples/samples.h"
#include "pipelines/train/ranks.h"

namespace flux::train {
namespace {

/// Pictures that pass through a block while it is there, at most.
constexpr int64_t kTogether = 4;

/// Of each rank. Ranks share them evenly.
int64_t pictures_at_once(const Session& session) {
  const int64_t pictures = std::ssize(session.prompts->all()) * session.options.sample_count,
                world = session.options.launch.world;
  return std::min(kTogether, (pictures + world - 1) / world);
}

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
  return engine::SampleShape{.batch = pictures_at_once(session),
                             .width = width,
                             .height = height,
                             .text_length = prompts.t5_length(),
                             .text_mask = prompts.masked(),
                             .text_type = prompts.type()};
}

namespace {

struct Wanted {
  const Prompt* prompt;
  samples::Info info;
};

/// Of the pictures that are this rank's. Throws Interrupted, in all ranks, after a signal to any.
std::vector<at::Tensor> sample(Session& session,
                               std::span<const Wanted> pictures,
                               const EulerOptions& euler) {
  const auto moved = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.to(session.device) : tensor;
  };
  std::vector<SampleInputs> inputs;
  for (const auto& [prompt, info] : pictures) {
    const MemoryScope scope(MemoryCause::kData);
    const PromptEmbedding text = session.prompts->load(*prompt);
    inputs.push_back(
        {.noise = moved(sample_noise(
             info.seed, prompt->id, info.index, samples::kChannels, info.height, info.width)),
         .prompt_embedding = moved(text.prompt),
         .pooled_embedding = moved(text.pooled),
         .text_mask = moved(text.mask)});
  }
  return euler_sample(
      [&](std::span<const dit::Inputs> all) {
        if (const auto stop = agreed_stop(session)) throw Interrupted(*stop);
        return session.trainer->predict(all);
      },
      euler,
      inputs);
}

/// Rank 0's pictures of every rank, by rank; elsewhere nothing. A picture of each at a time.
std::vector<std::vector<at::Tensor>> at_first_rank(const Session& session,
                                                   std::vector<at::Tensor> own) {
  if (!session.group) return {std::move(own)};
  const auto world = static_cast<size_t>(session.group->world());
  std::vector<std::vector<at::Tensor>> out(world);
  for (int64_t i = 0; i < pictures_at_once(session); ++i) {
    std::span<const float> values;
    at::Tensor mine;
    if (i < std::ssize(own)) {
      mine = own[static_cast<size_t>(i)].to(at::kCPU).contiguous();
      values = {mine.const_data_ptr<float>(), static_cast<size_t>(mine.numel())};
    }
    const auto all = gather_values(session, values);
    if (!session.leads()) continue;
    for (size_t rank = 0; rank < world; ++rank)
      if (!all[rank].empty()) out[rank].push_back(from_values<float>(all[rank], mine.sizes()));
  }
  return out;
}

}  // namespace

bool sample_if_due(Session& session) {
  const Options& o = session.options;
  if (!session.prompts || session.step == 0 || session.step % o.sample_every != 0) return false;
  if (agreed_stop(session)) return true;
  const auto [width, height] = sample_size(session);
  std::vector<Wanted> wanted;
  std::vector<samples::Info> infos;
  for (const Prompt& prompt : session.prompts->all())
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
  const bool made = session.leads() && is_made(path, header.settings, infos);
  if (gather_numbers(session, {made})[0][0]) return true;
  const EulerOptions euler{
      .sigmas = sampler_schedule(
          sample_steps(session), width / 16 * (height / 16), session.config.guidance),
      .guidance = o.sample_guidance.value_or(3.5)};
  std::vector<samples::Record> records;
  std::optional<Progress> progress;
  if (session.leads()) progress.emplace("sampling", "pictures", std::ssize(wanted));
  // each rank some, one behind the other
  const auto at_once = static_cast<size_t>(pictures_at_once(session)),
             world = static_cast<size_t>(o.launch.world), rank = static_cast<size_t>(o.launch.rank);
  const std::span<const Wanted> all(wanted);
  for (size_t first = 0; first < all.size(); first += at_once * world) {
    const auto of_rank = [&](size_t number) {
      const size_t begin = std::min(first + number * at_once, all.size());
      return all.subspan(begin, std::min(at_once, all.size() - begin));
    };
    std::vector<std::vector<at::Tensor>> latents;
    try {
      latents = at_first_rank(session, sample(session, of_rank(rank), euler));
    } catch (const Interrupted&) {
      return true;
    }
    if (!session.leads()) continue;
    for (size_t number = 0; number < world; ++number)
      for (size_t i = 0; i < of_rank(number).size(); ++i) {
        const auto& [prompt, info] = of_rank(number)[i];
        records.push_back(stored_picture(latents.at(number).at(i),
                                         *prompt,
                                         static_cast<int64_t>(info.index),
                                         o.sample_seed,
                                         {}));
      }
    progress->update(std::ssize(records));
  }
  if (!session.leads()) return true;
  const auto bytes = samples::encode(header, records);
  make_folder(path.parent_path());
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
  log::info("step {}: {} pictures sampled, {}", session.step, records.size(), show(path));
  return true;
}

}  // namespace flux::train
