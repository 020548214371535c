#include "pipelines/text/run.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/dataset/dataset.h"
#include "common/tensor/device.h"
#include "formats/cache/writer.h"
#include "pipelines/stage/finish.h"
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
                          stage::Precision precision) {
  cache::Recipe recipe;
  recipe.kind = cache::Kind::kText;
  recipe.parameters = {{"dtype", cache::dtype_word(options.encode.dtype)},
                       {"t5_length", options.t5_length_tokens},
                       {"t5_width", t5.config.width},
                       {"clip_width", clip.config.hidden},
                       {"precision", stage::precision_word(precision)},
                       {"pad_policy", pad_policy_word(options.pad_policy)},
                       {"clip_cleaning", kClipCleaning}};
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

std::vector<cache::WantedItem> items_of(const Wanted& wanted,
                                        const std::vector<Sha256Digest>& keys) {
  std::vector<cache::WantedItem> items;
  for (const Item& item : wanted.items) {
    cache::WantedItem out{item.item, item.subset, item.repeats, item.flags, item.path, {}};
    for (const Use& use : item.uses) out.variants.push_back({keys[use.caption], use.weight, 0});
    items.push_back(std::move(out));
  }
  return items;
}

// Moves the items that need a caption that could not be made from `items` to `quarantined`.
void quarantine(const std::vector<Failure>& failures,
                std::vector<cache::WantedItem>& items,
                std::vector<cache::Quarantined>& quarantined) {
  std::map<Sha256Digest, std::string> reasons;
  for (const Failure& failure : failures) reasons[failure.key] = failure.reason;
  std::erase_if(items, [&](const cache::WantedItem& item) {
    for (const auto& variant : item.variants) {
      const auto reason = reasons.find(variant.key);
      if (reason == reasons.end()) continue;
      quarantined.push_back(stage::leave_out(item.item, item.subset, item.path, reason->second));
      return true;
    }
    return false;
  });
}

void log_truncation(const Truncation& t, const Options& options, int64_t clip_length) {
  if (t.t5_captions > 0) {
    log::warn("{} captions have more than {} T5 tokens (the longest {}): {} tokens are cut off",
              t.t5_captions,
              options.t5_length_tokens,
              t.t5_longest,
              t.t5_tokens_lost);
  }
  if (t.clip_captions > 0) {
    log::info(
        "{} captions have more than {} CLIP tokens (the longest {}): {} tokens are cut off there; "
        "T5 reads on",
        t.clip_captions,
        clip_length,
        t.clip_longest,
        t.clip_tokens_lost);
  }
}

}  // namespace

stage::Report run(const Options& options) {
  const double start = stage::monotonic_seconds();
  use_huge_pages();
  const c10::Device device = resolve_device(options.encode.device);
  const cache::Provenance provenance =
      stage::begin("flux-cache-text", options.command_line, device);
  Wanted wanted = options.prompts.empty() ? read_dataset(options) : read_prompts(options.prompts);
  ClipFiles clip = read_clip(options);
  T5Files t5 = read_t5(options);

  const auto otherwise = device.is_cuda() ? stage::Precision::kBF16 : stage::Precision::kF32;
  const auto precision = stage::choose_precision(
      options.encode, stage::previous_manifest(options.encode.out), otherwise);
  const cache::Recipe recipe = make_recipe(options, clip, t5, precision);
  std::vector<Sha256Digest> keys;
  for (const std::string& caption : wanted.captions) keys.push_back(caption_key(caption, recipe));

  cache::Publication publication;
  publication.items = items_of(wanted, keys);
  publication.plan = wanted.plan;
  publication.plan_digest = to_hex(dataset::plan_digest(wanted.plan));
  publication.quarantined = std::move(wanted.quarantined);

  cache::Writer writer(options.encode.out, recipe, provenance);
  stage::Report report;
  report.noun = "captions";
  stage::announce(writer, writer.compare(publication.items, publication.plan), report);
  std::vector<Job> jobs;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!writer.contains(keys[i])) jobs.push_back({keys[i], wanted.captions[i]});
  }
  if (!jobs.empty()) {
    const Truncation truncation =
        count_truncation(wanted.captions, clip, t5, options.t5_length_tokens);
    log_truncation(truncation, options, clip.config.num_positions);
    publication.notes = {{"truncated", truncation.json()}};
    const double prepared = stage::monotonic_seconds();
    const Encoded encoded = encode_captions(jobs,
                                            std::move(clip),
                                            std::move(t5),
                                            precision,
                                            device,
                                            options,
                                            writer,
                                            cache::layout_of(recipe.kind, recipe.parameters));
    publication.stage_seconds = {
        {"prepare", prepared - start}, {"clip", encoded.clip_seconds}, {"t5", encoded.t5_seconds}};
    quarantine(encoded.failures, publication.items, publication.quarantined);
    report.encoded -= std::ssize(encoded.failures);
    report.changed = std::min(report.changed, report.encoded);
  } else if (const auto& previous = writer.previous()) {
    if (const auto it = previous->provenance.find("truncated"); it != previous->provenance.end())
      publication.notes["truncated"] = *it;
  }
  stage::finish(writer, publication, options.encode.max_failed, start, report);
  return report;
}

}  // namespace flux::text
