// tests/support/cache_samples.h - small caches with known content, for tests of the format and of
// what reads it.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "common/core/hash.h"
#include "common/core/rng.h"
#include "formats/cache/schema.h"
#include "formats/cache/writer.h"

namespace flux::test {

/// Sizes of the text tensors below.
inline constexpr int64_t kT5Length = 12, kT5Width = 16, kClipWidth = 8;

inline cache::Recipe recipe(cache::Kind kind, std::string dtype = "bf16") {
  cache::Recipe out;
  out.kind = kind;
  const std::string digest(64, 'a');
  if (kind == cache::Kind::kLatents) {
    out.parameters = {{"dtype", dtype}, {"channels", 32}, {"store", "mean_logvar"}};
    out.weights = {{"ae", digest}};
  } else {
    out.parameters = {{"dtype", dtype},
                      {"t5_length", kT5Length},
                      {"t5_width", kT5Width},
                      {"clip_width", kClipWidth}};
    out.weights = {{"t5", digest}, {"clip", digest}};
    out.tokenizers = {{"t5", digest}, {"clip", digest}};
  }
  return out;
}

inline cache::Provenance provenance() { return {"cache_test", "0.0.0", "cache_test --all", "cpu"}; }

/// Sample number `i`: its row and its tensors, always the same. Latents alternate between three
/// small buckets.
struct SampleData {
  cache::SampleInfo info;
  std::vector<std::vector<std::byte>> tensors;
  std::vector<std::span<const std::byte>> spans() const { return {tensors.begin(), tensors.end()}; }
};

inline SampleData sample(const cache::Layout& layout, uint64_t i) {
  SampleData out;
  cache::SampleInfo& info = out.info;
  const std::string name = std::string(cache::kind_name(layout.kind)) + std::to_string(i);
  info.key = sha256("key " + name);
  info.source_sha256 = sha256("source " + name);
  info.text = i % 5 == 4 ? std::string() : "photos/\xff " + name + "\n.jpg";  // any bytes, and none
  if (layout.kind == cache::Kind::kLatents) {
    constexpr std::array<std::array<uint32_t, 2>, 3> kBuckets = {{{4, 6}, {6, 4}, {4, 4}}};
    info.height = kBuckets[i % 3][0], info.width = kBuckets[i % 3][1];
    info.original_hw = {100 + static_cast<uint32_t>(i), 200};
    info.resized_hw = {info.height * 8 + 1, info.width * 8 + 2};
    info.crop_top_left = {1, 2};
    info.flags = i % 2 ? cache::kSampleFlipped : 0;
  } else {
    info.t5_tokens = static_cast<uint32_t>(i % (kT5Length + 1));
    info.t5_lost = static_cast<uint32_t>(i);
    info.clip_tokens = 7, info.clip_lost = 1;
  }
  const RandomStream random(7, Purpose::kNoise, i);
  for (int which = 0; which < cache::num_tensors(layout, info); ++which) {
    std::vector<float> values(static_cast<size_t>(cache::tensor_bytes(layout, info, which) * 8 /
                                                  dtype_bits(layout.dtype)));
    random.fill_normal(values);
    std::vector<std::byte> bytes;
    for (const float value :
         values) {  // bf16 and f16 bits need not mean the same numbers: they are only stored
      const auto* raw = reinterpret_cast<const std::byte*>(&value);
      const bool wide = layout.dtype == DType::kF32;
      bytes.insert(bytes.end(), raw + (wide ? 0 : 2), raw + 4);
    }
    out.tensors.push_back(std::move(bytes));
  }
  return out;
}

inline cache::WantedItem wanted(const SampleData& data, uint64_t i) {
  cache::WantedItem out;
  out.item = sha256("item " + std::to_string(i));
  out.subset = static_cast<uint32_t>(i % 2);
  out.repeats = 1 + static_cast<uint32_t>(i % 3);
  out.path = data.info.text;
  out.variants = {{data.info.key, 1.0, data.info.flags}};
  return out;
}

inline cache::Publication publication(std::vector<cache::WantedItem> items) {
  cache::Publication out;
  out.items = std::move(items);
  out.plan = {{"subsets", nlohmann::json::array({{{"index", 0}}})}};
  out.plan_digest = std::string(64, 'b');
  return out;
}

/// Fills `folder` with samples `begin` to `end` - 1, each wanted by one item.
inline void make_cache(const std::filesystem::path& folder,
                       const cache::Recipe& how,
                       uint64_t begin,
                       uint64_t end) {
  cache::Writer writer(folder, how, provenance());
  const auto layout = cache::layout_of(how.kind, how.parameters);
  std::vector<cache::WantedItem> items;
  for (uint64_t i = begin; i < end; ++i) {
    const SampleData data = sample(layout, i);
    writer.add(data.info, data.spans());
    items.push_back(wanted(data, i));
  }
  writer.publish(publication(std::move(items)));
}

}  // namespace flux::test
