#include "formats/cache/segment_writer.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

#include "common/core/file.h"
#include "formats/cache/codec.h"
#include "formats/cache/hdf5_file.h"
#include "formats/cache/header.h"
#include "formats/cache/manifest.h"
#include "formats/cache/tables.h"

namespace flux::cache {
namespace {

using Frames = std::vector<std::span<const std::byte>>;

}  // namespace

std::vector<std::byte> encode_segment(const SegmentHeader& header,
                                      std::span<const Record> records) {
  if (records.empty() || records.size() > static_cast<size_t>(kMaxSegmentSamples)) {
    throw std::invalid_argument(fmt::format("a segment of {} samples", records.size()));
  }
  const Recipe& recipe = header.recipe;
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  const Element element = element_of(layout.dtype);
  const auto num_samples = static_cast<int64_t>(records.size());

  Hdf5Image image;
  const bool masks = std::ranges::any_of(
      records, [](const Record& record) { return (record.info.flags & kSampleMasked) != 0; });
  write_header(image, recipe.kind, kSegmentContent, masks ? kMasksFeature : "");
  image.attribute("num_samples", num_samples);
  image.attribute("parameters", canonical_json(recipe.parameters));
  image.attribute("weights", canonical_json(recipe.weights));
  image.attribute("tokenizers", canonical_json(recipe.tokenizers));
  write_provenance(image, header.provenance, header.created);

  const auto column = [&](const char* name, auto get) {
    write_column(image, std::string("samples_") + name, records, [&](const Record& record) {
      return get(record.info);
    });
  };
  column("key", [](const SampleInfo& s) { return s.key; });
  column("source_sha256", [](const SampleInfo& s) { return s.source_sha256; });
  column("tensor_xxh3", [](const SampleInfo& s) { return s.tensor_xxh3; });
  column("flags", [](const SampleInfo& s) { return s.flags; });

  if (recipe.kind == Kind::kLatents) {
    std::map<std::array<uint32_t, 2>, Frames> buckets, masks_of;
    std::map<const Record*, uint32_t> rows;
    for (const Record& record : records) {
      const std::array bucket{record.info.height, record.info.width};
      Frames& frames = buckets[bucket];
      rows[&record] = static_cast<uint32_t>(frames.size());
      frames.push_back(record.frames[0]);
      if (record.info.flags & kSampleMasked) masks_of[bucket];
    }
    std::map<std::array<uint32_t, 2>, std::vector<std::byte>> ones;  // of samples without a mask
    for (auto& [bucket, frames] : masks_of) {
      const std::vector<float> one(size_t{bucket[0]} * bucket[1], 1.0f);
      ones[bucket] = encode_frame(std::as_bytes(std::span(one)), sizeof(float));
    }
    for (const Record& record : records) {
      const std::array bucket{record.info.height, record.info.width};
      if (!masks_of.contains(bucket)) continue;
      const bool masked = record.info.flags & kSampleMasked;
      masks_of[bucket].push_back(masked ? record.frames[1] : ones[bucket]);
    }
    column("bucket", [](const SampleInfo& s) { return std::array{s.height, s.width}; });
    write_column(
        image, "samples_row", records, [&](const Record& record) { return rows.at(&record); });
    column("original_hw", [](const SampleInfo& s) { return s.original_hw; });
    column("resized_hw", [](const SampleInfo& s) { return s.resized_hw; });
    column("crop_top_left", [](const SampleInfo& s) { return s.crop_top_left; });
    write_texts(
        image, "samples_path", records.size(), [&](size_t i) { return records[i].info.text; });
    for (const auto& [bucket, frames] : buckets) {
      const auto [height, width] = bucket;
      image.frames(fmt::format("latents_{}x{}", height, width),
                   element,
                   std::array<int64_t, 4>{
                       static_cast<int64_t>(frames.size()), layout.channels, height, width},
                   frames);
    }
    for (const auto& [bucket, frames] : masks_of) {
      const auto [height, width] = bucket;
      image.frames(fmt::format("masks_{}x{}", height, width),
                   Element::kF32,
                   std::array<int64_t, 3>{static_cast<int64_t>(frames.size()), height, width},
                   frames);
    }
  } else {
    column("t5_tokens", [](const SampleInfo& s) { return s.t5_tokens; });
    column("t5_lost", [](const SampleInfo& s) { return s.t5_lost; });
    column("clip_tokens", [](const SampleInfo& s) { return s.clip_tokens; });
    column("clip_lost", [](const SampleInfo& s) { return s.clip_lost; });
    std::vector<std::byte> mask(static_cast<size_t>(num_samples * layout.t5_length), std::byte{0});
    Frames t5, clip;
    for (size_t i = 0; i < records.size(); ++i) {
      std::fill_n(mask.begin() + static_cast<int64_t>(i) * layout.t5_length,
                  records[i].info.t5_tokens,
                  std::byte{1});
      t5.push_back(records[i].frames[0]);
      clip.push_back(records[i].frames[1]);
    }
    image.table("samples_t5_mask", Element::kU8, num_samples, layout.t5_length, mask);
    write_texts(
        image, "samples_caption", records.size(), [&](size_t i) { return records[i].info.text; });
    image.frames("t5", element, std::array{num_samples, layout.t5_length, layout.t5_width}, t5);
    image.frames("clip", element, std::array{num_samples, layout.clip_width}, clip);
  }
  return image.finish();
}

std::string new_segment_name() { return "seg-" + random_name() + ".h5"; }

bool is_segment_name(std::string_view name) {
  return name.size() == 23 && name.starts_with("seg-") && name.ends_with(".h5") &&
         is_hex(name.substr(4, 16), 16);
}

}  // namespace flux::cache
