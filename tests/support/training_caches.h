// tests/support/training_caches.h - a pair of small caches that a trainer can join, without any
// encoder.
#pragma once
#include <fmt/format.h>

#include <cmath>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "common/core/hash.h"
#include "common/core/rng.h"
#include "common/dataset/dataset.h"
#include "formats/cache/manifest.h"
#include "formats/cache/writer.h"
#include "tests/support/plain_plan.h"

namespace flux::test {

struct TrainingItem {
  std::string name;
  uint32_t rows = 8, columns = 8;  // of the latents
  uint32_t subset = 0, repeats = 1, flags = 0;
  int num_captions = 1;
  uint32_t t5_tokens = 3;  // live ones of each caption
  bool flipped_too = false;
  bool masked = false;  // with a loss mask: element i of n is i / n
  bool spoilt = false;  // element 2 of the latents is NaN
};

struct TrainingCaches {
  std::vector<TrainingItem> items;
  int64_t t5_length = 512, t5_width = 16, clip_width = 8;
  std::string pad_policy = "full";
  std::string store = "mean_logvar";
  double flip_weight = 0.5;  // of each variant of an item that is flipped too
  bool empty_caption = false;
  nlohmann::json plan = plain_plan();
  std::vector<cache::Quarantined> quarantined;  // of the latents
  std::function<bool(const std::string& name)> in_latents = [](const auto&) { return true; };
  std::function<bool(const std::string& name)> in_text = [](const auto&) { return true; };

  int64_t channels() const { return store == "sample" ? 16 : 32; }

  cache::Publication publication(std::vector<cache::WantedItem> wanted) const {
    cache::Publication out;
    out.items = std::move(wanted);
    out.plan = plan;
    out.plan_digest = to_hex(sha256(cache::canonical_json(plan)));
    return out;
  }

  static cache::WantedItem wanted(const TrainingItem& item) {
    cache::WantedItem out;
    out.item = dataset::item_digest(item.subset, item.name);
    out.subset = item.subset, out.repeats = item.repeats, out.flags = item.flags;
    out.path = item.name;
    return out;
  }

  /// Latents: the mean's elements are normal draws keyed by name, the log-variance is -2. bfloat16
  /// bits.
  void write_latents(const std::filesystem::path& folder) const {
    cache::Recipe recipe;
    recipe.kind = cache::Kind::kLatents;
    recipe.parameters = {{"dtype", "bf16"},
                         {"channels", channels()},
                         {"store", store},
                         {"precision", "f32"},
                         {"profile", "default"},
                         {"shift", 0.1159},
                         {"scale", 0.3611}};
    recipe.weights = {{"ae", std::string(64, 'a')}};
    cache::Writer writer(folder, recipe, {"test", "0", "test", "cpu"});
    std::vector<cache::WantedItem> all;
    for (const TrainingItem& item : items) {
      if (!in_latents(item.name)) continue;
      cache::WantedItem want = wanted(item);
      for (int flip = 0; flip <= (item.flipped_too ? 1 : 0); ++flip) {
        cache::SampleInfo info;
        info.key = sha256(fmt::format("latents {} {} {}", item.name, item.subset, flip));
        info.text = item.name;
        info.height = item.rows, info.width = item.columns;
        info.flags = (flip ? cache::kSampleFlipped : 0) | (item.masked ? cache::kSampleMasked : 0);
        const size_t n = 16 * item.rows * item.columns;
        std::vector<float> values(static_cast<size_t>(channels()) * item.rows * item.columns,
                                  -2.0f);
        RandomStream(
            1, Purpose::kDemo, std::hash<std::string>()(item.name), static_cast<uint64_t>(flip))
            .fill_normal(std::span(values).first(n));
        if (item.spoilt) values[2] = NAN;
        std::vector<std::vector<std::byte>> tensors{bf16(values)};
        if (item.masked) tensors.push_back(ramp(item.rows * item.columns));
        add(writer, info, tensors);
        want.variants.push_back({info.key, item.flipped_too ? flip_weight : 1.0, info.flags});
      }
      all.push_back(want);
    }
    cache::Publication what = publication(std::move(all));
    what.quarantined = quarantined;
    writer.publish(what);
  }

  /// Text: every element of caption number k of an item is k + 1; of the empty caption, 0 (3 live
  /// tokens).
  void write_text(const std::filesystem::path& folder) const {
    cache::Recipe recipe;
    recipe.kind = cache::Kind::kText;
    recipe.parameters = {{"dtype", "bf16"},
                         {"t5_length", t5_length},
                         {"t5_width", t5_width},
                         {"clip_width", clip_width},
                         {"precision", "f32"},
                         {"pad_policy", pad_policy},
                         {"clip_cleaning", "fast"}};
    recipe.weights = {{"t5", std::string(64, 'b')}, {"clip", std::string(64, 'c')}};
    recipe.tokenizers = {{"t5", std::string(64, 'd')}, {"clip", std::string(64, 'e')}};
    cache::Writer writer(folder, recipe, {"test", "0", "test", "cpu"});
    std::vector<cache::WantedItem> all;
    const auto add_caption = [&](const std::string& caption, float value, uint32_t tokens) {
      cache::SampleInfo info;
      info.key = sha256("text " + caption);
      info.text = caption;
      info.t5_tokens = tokens, info.clip_tokens = 3;
      add(writer,
          info,
          {bf16(std::vector<float>(static_cast<size_t>(t5_length * t5_width), value)),
           bf16(std::vector<float>(static_cast<size_t>(clip_width), value))});
      return info.key;
    };
    for (const TrainingItem& item : items) {
      if (!in_text(item.name)) continue;
      cache::WantedItem want = wanted(item);
      for (int k = 0; k < item.num_captions; ++k) {
        want.variants.push_back(
            {add_caption(
                 fmt::format("{} {}", item.name, k), static_cast<float>(k + 1), item.t5_tokens),
             1.0 / item.num_captions,
             0});
      }
      all.push_back(want);
    }
    if (empty_caption) {
      cache::WantedItem want;
      want.item = sha256("empty caption");
      want.flags = cache::kItemEmptyCaption;
      want.variants.push_back({add_caption("", 0, 3), 1.0, 0});
      all.push_back(want);
    }
    writer.publish(publication(std::move(all)));
  }

  /// ROOT/latents and ROOT/text.
  void write(const std::filesystem::path& root) const {
    write_latents(root / "latents");
    write_text(root / "text");
  }

 private:
  static std::vector<std::byte> ramp(int64_t n) {
    std::vector<float> values;
    for (int64_t i = 0; i < n; ++i) values.push_back(static_cast<float>(i) / static_cast<float>(n));
    const auto bytes = std::as_bytes(std::span(values));
    return {bytes.begin(), bytes.end()};
  }
  static std::vector<std::byte> bf16(const std::vector<float>& values) {
    std::vector<std::byte> out;
    for (const float value : values) {
      const auto* raw = reinterpret_cast<const std::byte*>(&value);
      out.insert(out.end(), raw + 2, raw + 4);
    }
    return out;
  }
  static void add(cache::Writer& writer,
                  const cache::SampleInfo& info,
                  const std::vector<std::vector<std::byte>>& tensors) {
    const std::vector<std::span<const std::byte>> spans(tensors.begin(), tensors.end());
    writer.add(info, spans);
  }
};

}  // namespace flux::test
