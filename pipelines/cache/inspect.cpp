#include "pipelines/cache/inspect.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::cache {
namespace {

using Json = nlohmann::json;

constexpr size_t kNumWorst = 10;
constexpr size_t kShownCaption = 60;  // bytes of a caption in a table

int64_t t5_total(const SampleInfo& info) { return int64_t{info.t5_tokens} + info.t5_lost; }
int64_t clip_total(const SampleInfo& info) { return int64_t{info.clip_tokens} + info.clip_lost; }

struct Bucket {
  int64_t samples = 0, flipped = 0, items = 0, visits = 0;
};

// By height and width of the latents.
std::map<std::pair<uint32_t, uint32_t>, Bucket> buckets_of(const Contents& c) {
  std::map<std::pair<uint32_t, uint32_t>, Bucket> buckets;
  for (const auto& sample : c.samples) {
    Bucket& bucket = buckets[{sample.info.height, sample.info.width}];
    ++bucket.samples;
    if (sample.info.flags & kSampleFlipped) ++bucket.flipped;
  }
  for (int64_t i = 0; c.index && i < c.index->num_items(); ++i) {
    const auto variants = c.index->variants(i);
    Bucket& bucket = buckets[{variants[0].height, variants[0].width}];
    ++bucket.items;
    bucket.visits += c.index->item(i).repeats;
  }
  return buckets;
}

struct Captions {
  int64_t items = 0, variants = 0, most_variants = 0, empty_records = 0;
  size_t longest_bytes = 0;
};

Captions captions_of(const Contents& c) {
  Captions out;
  for (const auto& sample : c.samples)
    out.longest_bytes = std::max(out.longest_bytes, sample.info.text.size());
  for (int64_t i = 0; c.index && i < c.index->num_items(); ++i) {
    if (c.index->item(i).flags & kItemEmptyCaption) {
      ++out.empty_records;
      continue;
    }
    const auto count = static_cast<int64_t>(c.index->variants(i).size());
    ++out.items;
    out.variants += count;
    out.most_variants = std::max(out.most_variants, count);
  }
  return out;
}

Json quarantined_json(const Manifest& manifest) {
  Json out = Json::array();
  for (const auto& item : manifest.quarantined) {
    out.push_back({{"item", to_hex(item.item)},
                   {"subset", item.subset},
                   {"path", printable(item.path)},
                   {"reason", printable(item.reason)}});
  }
  return out;
}

Json sample_json(const ListedSample& sample, Kind kind) {
  const SampleInfo& info = sample.info;
  Json out{{"key", to_hex(info.key)},
           {"tensor_xxh3", fmt::format("{:016x}", info.tensor_xxh3)},
           {"path", sample.path ? Json(printable(*sample.path)) : Json()},
           {"bucket", Json()}};
  if (kind == Kind::kLatents) {
    out["bucket"] = bucket_text(info.height, info.width);
  } else {
    out["caption"] = printable(info.text);
    out["t5_tokens"] = info.t5_tokens;
    out["t5_lost"] = info.t5_lost;
    out["clip_tokens"] = info.clip_tokens;
    out["clip_lost"] = info.clip_lost;
  }
  return out;
}

Json truncation_json(const Truncation& truncation) {
  Json out = Json::object();
  for (const auto& limit : truncation.limits) {
    out[limit.name] = {
        {"captions", limit.captions}, {"tokens_used", limit.used}, {"tokens_lost", limit.lost}};
  }
  out["worst"] = Json::array();
  for (const ListedSample* sample : truncation.worst) {
    const int64_t t5 = t5_total(sample->info), clip = clip_total(sample->info);
    out["worst"].push_back({{"caption", printable(sample->info.text)},
                            {"key", to_hex(sample->info.key)},
                            {"t5_tokens", t5},
                            {"t5_lost_256", std::max<int64_t>(t5 - 256, 0)},
                            {"t5_lost_512", std::max<int64_t>(t5 - 512, 0)},
                            {"clip_tokens", clip},
                            {"clip_lost_77", std::max<int64_t>(clip - 77, 0)}});
  }
  return out;
}

void append_object(std::string& out, const char* title, const Json& object) {
  if (!object.is_object() || object.empty()) return;
  out += fmt::format("{}\n", title);
  for (const auto& [name, value] : object.items())
    out += fmt::format("  {:<18} {}\n",
                       printable(name),
                       printable(value.is_string() ? value.get<std::string>() : value.dump()));
}

// Of the run that made the samples: where its time went, which stage limited it, how fast it was.
void append_last_run(std::string& out, const Json& provenance) {
  append_object(
      out, "seconds of the last run", value_of(provenance, "stage_seconds", Json::object()));
  const auto limit = value_of(provenance, "limit", std::string());
  if (!limit.empty()) out += fmt::format("limited by           {}\n", printable(limit));
  for (const char* noun : {"images", "captions"}) {
    const auto rate = provenance.find(fmt::format("{}_per_second", noun));
    if (rate != provenance.end() && rate->is_number())
      out += fmt::format("{:<20} {:.4g} a second\n", noun, rate->get<double>());
  }
}

void append_plan(std::string& out, const Contents& c) {
  const Json& plan = c.manifest->plan;
  if (plan.contains("num_prompts")) {
    out += fmt::format("prompts              {}\n", printable(plan["num_prompts"].dump()));
    return;
  }
  const Json subsets = value_of(plan, "subsets", Json());
  if (!subsets.is_array()) return;
  std::map<uint32_t, std::array<int64_t, 3>> counts;  // subset -> items, visits, validation items
  for (int64_t i = 0; c.index && i < c.index->num_items(); ++i) {
    const auto& item = c.index->item(i);
    if (item.flags & kItemEmptyCaption) continue;
    auto& count = counts[item.subset];
    ++count[0];
    count[1] += item.flags & kItemValidation ? 0 : item.repeats;
    count[2] += item.flags & kItemValidation ? 1 : 0;
  }
  out += "subset  dataset  items  visits  validation  regularisation  flip  caption dropout\n";
  for (const Json& subset : subsets) {
    const auto& count = counts[value_of(subset, "index", 0u)];
    out += fmt::format("{:>6}  {:>7}  {:>5}  {:>6}  {:>10}  {:>14}  {:>4}  {}\n",
                       value_of(subset, "index", 0),
                       value_of(subset, "dataset", 0),
                       count[0],
                       count[1],
                       count[2],
                       value_of(subset, "is_reg", false) ? "yes" : "no",
                       value_of(subset, "flip_aug", false) ? "yes" : "no",
                       value_of(subset, "caption_dropout_rate", 0.0));
  }
}

void append_text_tables(std::string& out, const Contents& c) {
  const Captions captions = captions_of(c);
  out += fmt::format("captions             {} distinct", c.samples.size());
  if (c.index) {
    out += fmt::format(", {} items with {:.3g} forms on average, {} at most{}",
                       captions.items,
                       captions.items ? static_cast<double>(captions.variants) /
                                            static_cast<double>(captions.items)
                                      : 0.0,
                       captions.most_variants,
                       captions.empty_records ? ", one empty for dropout" : "");
  }
  out += fmt::format(", the longest {}\n", show_bytes(captions.longest_bytes));
  const Truncation truncation = truncation_of(c.samples);
  out += "tokens      captions too long       read       lost\n";
  for (const auto& limit : truncation.limits)
    out += fmt::format(
        "{:<10}  {:>17} {:>10} {:>10}\n", limit.name, limit.captions, limit.used, limit.lost);
  if (truncation.worst.empty()) return;
  out += "the captions that lose most\n  T5 tokens  CLIP tokens  caption\n";
  for (const ListedSample* sample : truncation.worst) {
    out += fmt::format("  {:>9}  {:>11}  {}\n",
                       t5_total(sample->info),
                       clip_total(sample->info),
                       printable(shortened(sample->info.text, kShownCaption)));
  }
}

void append_latents_tables(std::string& out, const Contents& c) {
  out += "bucket        samples  mirrored  items  visits an epoch\n";
  for (const auto& [size, bucket] : buckets_of(c)) {
    out += fmt::format("{:<12} {:>8}  {:>8}  {:>5}  {:>15}\n",
                       bucket_text(size.first, size.second),
                       bucket.samples,
                       bucket.flipped,
                       bucket.items,
                       bucket.visits);
  }
}

}  // namespace

void add_flags(InspectOptions& options, Tool& tool) {
  tool.about("Says what a cache holds and who made it. Takes no lock and changes nothing.",
             "flux-cache inspect cache/latents");
  tool.arguments(options.folders, "DIR", "cache folder; one that is not complete, too");
  tool.flag(
      "samples", options.samples, "list every sample: key, XXH3 of its tensors, path, bucket");
  tool.flag(
      "recover", options.recover, "count and list what the journals of a killed writer hold, too");
}

void check(const InspectOptions& options) {
  require_one_folder(options.folders, "flux-cache inspect cache/latents");
}

Truncation truncation_of(const std::vector<ListedSample>& samples) {
  Truncation out;
  out.limits = {{"clip_77", true, 77}, {"t5_256", false, 256}, {"t5_512", false, 512}};
  for (auto& limit : out.limits) {
    for (const auto& sample : samples) {
      const int64_t total = limit.clip ? clip_total(sample.info) : t5_total(sample.info);
      limit.captions += total > limit.length;
      limit.used += std::min(total, limit.length);
      limit.lost += std::max<int64_t>(total - limit.length, 0);
    }
  }
  for (const auto& sample : samples) {
    if (clip_total(sample.info) > 77 || t5_total(sample.info) > 256) out.worst.push_back(&sample);
  }
  const auto more = [](const ListedSample* a, const ListedSample* b) {
    return std::tuple(-t5_total(a->info), -clip_total(a->info), a->info.key) <
           std::tuple(-t5_total(b->info), -clip_total(b->info), b->info.key);
  };
  const auto count = std::min(out.worst.size(), kNumWorst);
  std::partial_sort(out.worst.begin(),
                    out.worst.begin() + static_cast<std::ptrdiff_t>(count),
                    out.worst.end(),
                    more);
  out.worst.resize(count);
  return out;
}

Json inspect_json(const Contents& c, const InspectOptions& options) {
  Json out{{"format", kFormat},
           {"schema_version", kSchemaVersion},
           {"folder", printable(c.folder.native())},
           {"kind", c.kind ? Json(kind_name(*c.kind)) : Json()},
           {"complete", c.complete},
           {"num_samples", c.samples.size()},
           {"num_items", c.manifest ? Json(c.manifest->num_items) : Json()},
           {"num_unwanted", c.num_unwanted},
           {"num_in_journals", c.num_in_journals},
           {"num_bytes", c.num_bytes},
           {"segment_bytes", c.segment_bytes},
           {"decoded_bytes", c.decoded_bytes},
           {"problems", Json::array()},
           {"segments", Json::array()},
           {"journals", Json::array()},
           {"parameters", c.header.recipe.parameters},
           {"weights", c.header.recipe.weights},
           {"tokenizers", c.header.recipe.tokenizers}};
  for (const auto& problem : c.problems) out["problems"].push_back(printable(problem));
  for (const auto& s : c.segments)
    out["segments"].push_back(
        {{"name", s.name}, {"bytes", s.bytes}, {"num_samples", s.num_samples}});
  for (const auto& j : c.journals) {
    out["journals"].push_back({{"name", j.name},
                               {"bytes", j.bytes},
                               {"num_samples", j.num_samples},
                               {"torn_bytes", j.torn_bytes}});
  }
  out["provenance"] = c.manifest
                          ? c.manifest->provenance
                          : Json{{"tool", c.header.provenance.tool},
                                 {"tool_version", c.header.provenance.tool_version},
                                 {"command_line", printable(c.header.provenance.command_line)},
                                 {"device", c.header.provenance.device},
                                 {"created", c.header.created}};
  if (c.manifest) {
    out["plan"] = c.manifest->plan;
    out["plan_digest"] = c.manifest->plan_digest;
    out["shard"] = {{"index", c.manifest->shard.index}, {"count", c.manifest->shard.count}};
    out["quarantined"] = quarantined_json(*c.manifest);
  }
  if (c.kind == Kind::kLatents) {
    out["buckets"] = Json::array();
    for (const auto& [size, bucket] : buckets_of(c)) {
      out["buckets"].push_back({{"bucket", bucket_text(size.first, size.second)},
                                {"num_samples", bucket.samples},
                                {"num_flipped", bucket.flipped},
                                {"num_items", bucket.items},
                                {"visits", bucket.visits}});
    }
  } else if (c.kind == Kind::kText) {
    const Captions captions = captions_of(c);
    out["captions"] = {{"num_distinct", c.samples.size()},
                       {"num_items", captions.items},
                       {"num_variants", captions.variants},
                       {"most_variants", captions.most_variants},
                       {"has_empty", captions.empty_records > 0},
                       {"longest_bytes", captions.longest_bytes}};
    out["truncation"] = truncation_json(truncation_of(c.samples));
  }
  if (options.samples) {
    out["samples"] = Json::array();
    for (const auto& sample : c.samples) out["samples"].push_back(sample_json(sample, *c.kind));
  }
  return out;
}

std::string inspect_text(const Contents& c, const InspectOptions& options) {
  const auto& p = c.header.provenance;
  std::string out = fmt::format("{}: {}, {}\n",
                                show(c.folder),
                                c.kind ? fmt::format("{} cache", kind_name(*c.kind)) : "no samples",
                                c.complete ? "complete" : "not complete");
  const auto append_problems = [&] {
    for (const auto& problem : c.problems)
      out += fmt::format("problem              {}\n", printable(problem));
  };
  if (!c.kind) {
    append_problems();
    return out.substr(0, out.size() - 1);
  }
  out += fmt::format("made by              {} {} on {}, {}\n",
                     printable(p.tool),
                     printable(p.tool_version),
                     printable(p.device),
                     printable(c.header.created));
  out += fmt::format("with                 {}\n", printable(p.command_line));
  out += fmt::format("samples              {}", c.samples.size());
  if (c.num_in_journals && options.recover)
    out += fmt::format(", {} of them in journals", c.num_in_journals);
  if (c.num_in_journals && !options.recover)
    out += fmt::format("; {} more in journals (--recover counts them)", c.num_in_journals);
  if (c.num_unwanted)
    out += fmt::format("; {} more that no item wants (flux-cache gc removes them)", c.num_unwanted);
  out += "\n";
  if (c.manifest) {
    out += fmt::format(
        "items                {}{}\n",
        c.manifest->num_items,
        c.manifest->shard.count > 1
            ? fmt::format("; shard {} of {}", c.manifest->shard.index, c.manifest->shard.count)
            : "");
  }
  const auto in_segments = static_cast<double>(c.segment_bytes);
  int64_t stored = 0;
  for (const auto& s : c.segments) stored += s.num_samples;
  out += fmt::format("size                 {} in {}",
                     show_bytes(static_cast<uint64_t>(c.num_bytes)),
                     counted(std::ssize(c.segments), "segment"));
  if (stored > 0) {
    out += fmt::format(", {:.0f} bytes a sample, {:.3f} of the tensors'",
                       in_segments / static_cast<double>(stored),
                       c.decoded_bytes ? in_segments / static_cast<double>(c.decoded_bytes) : 0.0);
  }
  out += "\n";
  append_object(out, "parameters", c.header.recipe.parameters);
  append_object(out, "weights_sha256", c.header.recipe.weights);
  append_object(out, "tokenizers", c.header.recipe.tokenizers);
  if (c.manifest) {
    append_plan(out, c);
    append_last_run(out, c.manifest->provenance);
  }
  if (*c.kind == Kind::kLatents)
    append_latents_tables(out, c);
  else
    append_text_tables(out, c);
  if (c.manifest && !c.manifest->quarantined.empty()) {
    out += fmt::format("left out             {}\n", c.manifest->quarantined.size());
    for (const auto& item : c.manifest->quarantined)
      out += fmt::format("  {}: {}\n", show(item.path), printable(item.reason));
  }
  for (const auto& j : c.journals) {
    out += fmt::format("journal              {}: {}{}; the next run of the cache tool seals it\n",
                       j.name,
                       counted(j.num_samples, "sample"),
                       j.torn_bytes ? fmt::format(", {} torn", counted(j.torn_bytes, "byte")) : "");
  }
  append_problems();
  if (options.samples) {
    out +=
        "key                                                               tensor_xxh3       "
        "bucket     path\n";
    for (const auto& sample : c.samples) {
      out += fmt::format(
          "{}  {:016x}  {:<9}  {}\n",
          to_hex(sample.info.key),
          sample.info.tensor_xxh3,
          *c.kind == Kind::kLatents ? bucket_text(sample.info.height, sample.info.width) : "-",
          sample.path ? printable(*sample.path) : "-");
    }
  }
  out.pop_back();
  return out;
}

}  // namespace flux::cache
