#include "pipelines/text/run.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/dataset/dataset.h"
#include "common/tensor/device.h"
#include "formats/cache/writer.h"
#include "pipelines/stage/finish.h"
#include "pipelines/stage/reproduce.h"
#include "pipelines/text/encode.h"
#include "pipelines/text/nets.h"
#include "pipelines/text/read.h"

namespace flux::text {
namespace {

constexpr int64_t kSemanticsRevision =
    1;  // raise it when the same caption and parameters give other embeddings
constexpr char kClipCleaning[] =
    "fast";  // the HF fast tokenizer's, see common/tokenizers/clip_bpe.h

cache::Recipe make_recipe(const Options& options,
                          const ClipFiles& clip,
                          const T5Files& t5,
                          stage::Precision precision,
                          const Wanted& wanted) {
  cache::Recipe recipe;
  recipe.kind = cache::Kind::kText;
  recipe.parameters = {{"dtype", cache::dtype_word(options.encode.dtype)},
                       {"t5_length", options.t5_length_tokens},
                       {"t5_width", t5.weights.config().width},
                       {"clip_width", clip.config.hidden},
                       {"precision", stage::precision_word(precision)},
                       {"pad_policy", pad_policy_word(options.pad_policy)},
                       {"clip_cleaning", kClipCleaning}};
  if (wanted.has_random_parts) {
    recipe.parameters["text_variants"] = options.text_variants.value_or(kDefaultVariants);
    recipe.parameters["seed"] = options.seed;
  }
  recipe.weights = {{"t5", t5.weights_sha256}, {"clip", clip.weights_sha256}};
  recipe.tokenizers = {{"t5", t5.tokenizer_sha256}, {"clip", clip.tokenizer_sha256}};
  return recipe;
}

// FORMAT.md section 7.
Sha256Digest caption_key(const std::string& caption, const cache::Recipe& recipe) {
  nlohmann::json fields{{"kind", "text"},
                        {"revision", kSemanticsRevision},
                        {"caption_sha256", to_hex(sha256(caption))},
                        {"tokenizers", recipe.tokenizers},
                        {"weights", recipe.weights}};
  for (const char* name : {"clip_cleaning", "t5_length", "pad_policy", "precision", "dtype"})
    fields[name] = recipe.parameters.at(name);
  return cache::sample_key(fields);
}

std::vector<cache::WantedItem> items_of(const Wanted& wanted, const std::vector<Job>& jobs) {
  std::vector<cache::WantedItem> items;
  for (const Item& item : wanted.items) {
    cache::WantedItem out{item.item, item.subset, item.repeats, item.flags, item.path, {}};
    for (const Use& use : item.uses) out.variants.push_back({jobs[use.caption].key, use.weight});
    items.push_back(std::move(out));
  }
  return items;
}

// Bytes of the captions' tensors, uncompressed; without masked rows behind the last token, which
// are zero and take nothing.
double raw_bytes(std::span<const CaptionTokens> tokens,
                 const cache::Layout& layout,
                 PadPolicy policy) {
  double values = 0;
  for (const CaptionTokens& caption : tokens) {
    const int64_t rows =
        policy == PadPolicy::kFull ? layout.t5_length : std::min(caption.t5, layout.t5_length);
    values += static_cast<double>(rows * layout.t5_width + layout.clip_width);
  }
  return values * static_cast<double>(dtype_bits(layout.dtype)) / 8;
}

}  // namespace

stage::Report run(const Options& options) {
  stage::Timing timing;
  use_huge_pages();
  const c10::Device device = resolve_device(options.encode.device);
  const cache::Provenance provenance =
      stage::begin("flux-cache-text", options.command_line, device);
  Wanted wanted = options.prompts.empty() ? read_dataset(options) : read_prompts(options.prompts);
  if (options.text_variants && !wanted.has_random_parts) {
    log::warn(
        "--text-variants {} has no effect: no caption has random parts (shuffled tags, wildcards)",
        *options.text_variants);
  }
  const int64_t fixed = process_bytes();
  ClipFiles clip = read_clip(options);
  T5Files t5 = read_t5(options);

  const auto otherwise = device.is_cuda() ? stage::Precision::kBF16 : stage::Precision::kF32;
  const auto precision = stage::choose_precision(options.encode, otherwise);
  const cache::Recipe recipe = make_recipe(options, clip, t5, precision, wanted);
  const T5Plan plan = plan_t5(t5.weights, torch_type(precision), device, options, fixed);
  const cache::Layout layout = cache::layout_of(recipe.kind, recipe.parameters);
  std::vector<Job> all;
  for (const std::string& caption : wanted.captions)
    all.push_back({caption_key(caption, recipe), caption});

  stage::Report report;
  report.noun = "captions";
  if (options.encode.reproduce > 0) {
    stage::Reproduction reproduction(options.encode.out, recipe, options.encode.shard);
    std::vector<Sha256Digest> keys;
    for (const Job& job : all) keys.push_back(job.key);
    const auto chosen = reproduction.choose(keys, options.encode.reproduce);
    std::erase_if(all,
                  [&](const Job& job) { return !std::ranges::binary_search(chosen, job.key); });
    const Encoded encoded = encode_captions(all,
                                            std::move(clip),
                                            std::move(t5),
                                            plan,
                                            precision,
                                            device,
                                            options,
                                            timing.stages,
                                            reproduction);
    report.drift = reproduction.drift(encoded.failures);
    report.exit_code = report.drift->within() ? ExitCode::kOk : ExitCode::kDiffers;
    return report;
  }

  cache::Publication publication;
  publication.items = items_of(wanted, all);
  publication.plan = wanted.plan;
  publication.plan_digest = to_hex(dataset::plan_digest(wanted.plan));
  publication.quarantined = std::move(wanted.quarantined);

  cache::Writer writer(options.encode.out,
                       recipe,
                       provenance,
                       {.shard = options.encode.shard, .verify_segments = options.encode.rehash});
  stage::require_same_use(options.encode.out, writer.previous(), wanted.plan, options.encode.shard);
  std::map<Sha256Digest, const Job*> by_key;
  for (const Job& job : all) by_key[job.key] = &job;
  stage::announce(writer,
                  writer.compare(publication.items,
                                 publication.plan,
                                 [&](const Sha256Digest& key) { return info_of(*by_key.at(key)); }),
                  report);
  std::vector<Job> jobs;
  std::vector<size_t> places;  // of the jobs among all captions
  for (size_t i = 0; i < all.size(); ++i) {
    if (!writer.wants(all[i].key) || writer.contains(all[i].key)) continue;
    jobs.push_back(all[i]);
    places.push_back(i);
  }
  if (!jobs.empty()) {
    const auto tokens = count_tokens(wanted.captions, clip, t5);
    const auto truncation = truncation_json(wanted.captions, tokens);
    log_truncation(truncation, options.t5_length_tokens);
    publication.notes["truncated"] = truncation;
    std::vector<CaptionTokens> tokens_of_jobs;
    for (const size_t place : places) tokens_of_jobs.push_back(tokens[place]);
    // Of FLUX's nets it is known how well their embeddings compress, of others it is measured.
    const auto share = [&] {
      constexpr int64_t kFluxT5Width = 4096;
      const double known = stage::compressed_share(layout.dtype);
      if (layout.t5_width == kFluxT5Width) return known;
      std::vector<Job> few;
      std::vector<CaptionTokens> tokens_of_few;
      for (const size_t place : stage::measured_places(jobs.size())) {
        few.push_back(jobs[place]);
        tokens_of_few.push_back(tokens_of_jobs[place]);
      }
      stage::StageTimes uncounted;
      stage::Measurement measurement(layout);
      const Encoded encoded = encode_captions(few,
                                              read_clip(options),
                                              read_t5(options),
                                              plan,
                                              precision,
                                              device,
                                              options,
                                              uncounted,
                                              measurement);
      if (!encoded.failures.empty()) return known;
      return static_cast<double>(measurement.compressed_bytes()) /
             raw_bytes(tokens_of_few, layout, options.pad_policy);
    };
    report.predicted_bytes = stage::predict(writer,
                                            options.encode,
                                            std::ssize(jobs),
                                            raw_bytes(tokens_of_jobs, layout, options.pad_policy),
                                            share());
    log::info("{}", plan.describe());
    timing.before["prepare"] = stage::monotonic_seconds() - timing.start_seconds;
    stage::fill(
        options.encode,
        writer,
        layout,
        timing,
        [&](stage::Sink& sink) {
          return encode_captions(jobs,
                                 std::move(clip),
                                 std::move(t5),
                                 plan,
                                 precision,
                                 device,
                                 options,
                                 timing.stages,
                                 sink);
        },
        publication,
        report);
    log::info("memory: {} planned, process {} at most",
              show_bytes(static_cast<uint64_t>(plan.bytes)),
              show_bytes(peak_rss_bytes()));
  } else {
    publication.late_notes = [&] {
      const auto tokens = count_tokens(wanted.captions, clip, t5);
      return nlohmann::json{{"truncated", truncation_json(wanted.captions, tokens)}};
    };
  }
  stage::finish(options.encode, writer, publication, timing, report);
  return report;
}

}  // namespace flux::text
