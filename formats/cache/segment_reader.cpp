#include "formats/cache/segment_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>

#include "common/core/error.h"
#include "common/core/text.h"
#include "formats/cache/codec.h"
#include "formats/cache/header.h"
#include "formats/cache/tables.h"

namespace flux::cache {
namespace {

constexpr int64_t kMaxTextsBytes = kMaxSegmentSamples * kMaxTextBytes + 1;

nlohmann::json json_attribute(const Hdf5File& file, const char* name) {
  auto value = nlohmann::json::parse(file.text_attribute(name), nullptr, false);
  if (!value.is_object())
    file.refuse(fmt::format("root attribute '{}' is not a JSON object", name));
  return value;
}

}  // namespace

Segment::Segment(const std::filesystem::path& path) : file_(path) {
  Recipe& recipe = header_.recipe;
  recipe.kind = read_header(file_,
                            kSegmentContent,
                            {"num_samples",
                             "parameters",
                             "weights",
                             "tokenizers",
                             "tool",
                             "tool_version",
                             "command_line",
                             "device",
                             "created"});
  recipe.parameters = json_attribute(file_, "parameters");
  recipe.weights = json_attribute(file_, "weights");
  recipe.tokenizers = json_attribute(file_, "tokenizers");
  header_.provenance = {file_.text_attribute("tool"),
                        file_.text_attribute("tool_version"),
                        file_.text_attribute("command_line"),
                        file_.text_attribute("device")};
  header_.created = file_.text_attribute("created");
  try {
    layout_ = check_recipe(recipe);
  } catch (const CacheError& error) {
    file_.refuse(error.what());
  }
  const int64_t num_samples = file_.number_attribute("num_samples");
  if (num_samples < 1 || num_samples > kMaxSegmentSamples) {
    file_.refuse(
        fmt::format("says it has {} samples, expected 1 to {}", num_samples, kMaxSegmentSamples));
  }
  samples_.resize(static_cast<size_t>(num_samples));
  places_.resize(samples_.size());

  const std::span<SampleInfo> rows = samples_;
  read_column<Sha256Digest>(
      file_, "samples_key", rows, [](SampleInfo& s, const Sha256Digest& v) { s.key = v; });
  read_column<Sha256Digest>(
      file_, "samples_source_sha256", rows, [](SampleInfo& s, const Sha256Digest& v) {
        s.source_sha256 = v;
      });
  read_column<uint64_t>(
      file_, "samples_tensor_xxh3", rows, [](SampleInfo& s, uint64_t v) { s.tensor_xxh3 = v; });
  read_column<uint32_t>(
      file_, "samples_flags", rows, [](SampleInfo& s, uint32_t v) { s.flags = v; });
  const uint32_t known = recipe.kind == Kind::kLatents ? kSampleFlags : 0;
  bool masks = false;
  for (size_t i = 0; i < samples_.size(); ++i) {
    if (samples_[i].flags & ~known)
      file_.refuse(
          fmt::format("sample {} has the flags {}, known are {}", i, samples_[i].flags, known));
    masks = masks || samples_[i].flags & kSampleMasked;
  }
  if (masks != (file_.text_attribute("required_features") == kMasksFeature)) {
    file_.refuse(masks ? "has samples with masks, but does not require the feature 'masks'"
                       : "requires the feature 'masks', but no sample has one");
  }
  if (recipe.kind == Kind::kLatents)
    open_latents();
  else
    open_text();
}

void Segment::open_latents() {
  using Pair = std::array<uint32_t, 2>;
  const std::span<SampleInfo> rows = samples_;
  read_column<Pair>(file_, "samples_bucket", rows, [](SampleInfo& s, const Pair& v) {
    s.height = v[0], s.width = v[1];
  });
  read_column<Pair>(
      file_, "samples_original_hw", rows, [](SampleInfo& s, const Pair& v) { s.original_hw = v; });
  read_column<Pair>(
      file_, "samples_resized_hw", rows, [](SampleInfo& s, const Pair& v) { s.resized_hw = v; });
  read_column<Pair>(file_, "samples_crop_top_left", rows, [](SampleInfo& s, const Pair& v) {
    s.crop_top_left = v;
  });
  const Texts paths = read_texts(file_, "samples_path", samples_.size(), kMaxTextsBytes);
  std::vector<uint32_t> row_of(samples_.size());
  read_column<uint32_t>(
      file_, "samples_row", std::span(row_of), [](uint32_t& row, uint32_t v) { row = v; });

  // every row of every bucket's dataset is one sample's, and there is no other dataset
  std::map<Pair, std::set<uint32_t>> buckets;
  std::set<Pair> masked;  // buckets with a mask
  for (size_t i = 0; i < samples_.size(); ++i) {
    SampleInfo& sample = samples_[i];
    sample.text = paths.at(i);
    if (sample.flags & kSampleMasked) masked.insert({sample.height, sample.width});
    if (sample.height < 1 || sample.height > kMaxLatentSide || sample.width < 1 ||
        sample.width > kMaxLatentSide || tensor_bytes(layout_, sample, 0) > kMaxTensorBytes) {
      file_.refuse(
          fmt::format("sample {} has a bucket of {} x {}", i, sample.height, sample.width));
    }
    if (!buckets[{sample.height, sample.width}].insert(row_of[i]).second) {
      file_.refuse(fmt::format("sample {} has the row {} of another sample", i, row_of[i]));
    }
  }
  std::map<Pair, std::shared_ptr<Hdf5File::Frames>> frames, masks;
  for (const auto& [bucket, used] : buckets) {
    const auto num_rows = static_cast<int64_t>(used.size());
    if (*used.rbegin() >= num_rows) {
      file_.refuse(fmt::format("a sample has row {} of {} in bucket {} x {}",
                               *used.rbegin(),
                               num_rows,
                               bucket[0],
                               bucket[1]));
    }
    frames[bucket] =
        file_.open_frames(fmt::format("latents_{}x{}", bucket[0], bucket[1]),
                          element_of(layout_.dtype),
                          std::array<int64_t, 4>{num_rows, layout_.channels, bucket[0], bucket[1]});
    if (!masked.contains(bucket)) continue;
    masks[bucket] = file_.open_frames(fmt::format("masks_{}x{}", bucket[0], bucket[1]),
                                      Element::kF32,
                                      std::array<int64_t, 3>{num_rows, bucket[0], bucket[1]});
  }
  for (size_t i = 0; i < samples_.size(); ++i) {
    const Pair bucket{samples_[i].height, samples_[i].width};
    places_[i] = {{frames.at(bucket), row_of[i]}};
    if (samples_[i].flags & kSampleMasked) places_[i].push_back({masks.at(bucket), row_of[i]});
  }
  constexpr size_t kTables = 11;
  const size_t expected = kTables + buckets.size() + masked.size();
  if (file_.datasets().size() != expected) {
    file_.refuse(
        fmt::format("has {} datasets, {} belong to it", file_.datasets().size(), expected));
  }
}

void Segment::open_text() {
  const std::span<SampleInfo> rows = samples_;
  read_column<uint32_t>(
      file_, "samples_t5_tokens", rows, [](SampleInfo& s, uint32_t v) { s.t5_tokens = v; });
  read_column<uint32_t>(
      file_, "samples_t5_lost", rows, [](SampleInfo& s, uint32_t v) { s.t5_lost = v; });
  read_column<uint32_t>(
      file_, "samples_clip_tokens", rows, [](SampleInfo& s, uint32_t v) { s.clip_tokens = v; });
  read_column<uint32_t>(
      file_, "samples_clip_lost", rows, [](SampleInfo& s, uint32_t v) { s.clip_lost = v; });
  const Texts captions = read_texts(file_, "samples_caption", samples_.size(), kMaxTextsBytes);
  const auto mask = file_.table("samples_t5_mask", Element::kU8, num_samples(), layout_.t5_length);
  const auto length = static_cast<size_t>(layout_.t5_length);
  const Element element = element_of(layout_.dtype);
  const auto t5 = file_.open_frames(
      "t5", element, std::array{num_samples(), layout_.t5_length, layout_.t5_width});
  const auto clip =
      file_.open_frames("clip", element, std::array{num_samples(), layout_.clip_width});
  for (size_t i = 0; i < samples_.size(); ++i) {
    SampleInfo& sample = samples_[i];
    sample.text = captions.at(i);
    bool fits = sample.t5_tokens <= length;
    for (size_t k = 0; fits && k < length; ++k) {
      fits = mask[i * length + k] == std::byte{k < sample.t5_tokens};
    }
    if (!fits)
      file_.refuse(
          fmt::format("sample {} has {} T5 tokens, but another mask", i, sample.t5_tokens));
    places_[i] = {{t5, static_cast<int64_t>(i)}, {clip, static_cast<int64_t>(i)}};
  }
  constexpr size_t kDatasets = 13;
  if (file_.datasets().size() != kDatasets) {
    file_.refuse(
        fmt::format("has {} datasets, {} belong to it", file_.datasets().size(), kDatasets));
  }
}

std::span<const std::byte> Segment::frame(int64_t row,
                                          int which,
                                          std::vector<std::byte>& buffer) const {
  const Place& place = places_[static_cast<size_t>(row)][static_cast<size_t>(which)];
  return file_.frame(*place.frames,
                     place.row,
                     tensor_bytes(layout_, samples_[static_cast<size_t>(row)], which),
                     buffer);
}

void Segment::read(int64_t row,
                   std::span<const std::span<std::byte>> tensors,
                   FrameChecksum checksum) const {
  if (row < 0 || row >= num_samples() ||
      tensors.size() !=
          static_cast<size_t>(num_tensors(layout_, samples_[static_cast<size_t>(row)]))) {
    throw std::invalid_argument(
        fmt::format("sample {} of {} into {} tensors", row, num_samples(), tensors.size()));
  }
  const SampleInfo& sample = samples_[static_cast<size_t>(row)];
  Xxh3 hash;
  // kept, since fresh pages cost as much as reading
  thread_local std::vector<std::byte> buffer;
  for (int i = 0; i < num_tensors(layout_, sample); ++i) {
    const auto out = tensors[static_cast<size_t>(i)];
    const int64_t expected = tensor_bytes(layout_, sample, i);
    if (out.size() != static_cast<size_t>(expected)) {
      throw std::invalid_argument(
          fmt::format("tensor {} has {} bytes, the buffer {}", i, expected, out.size()));
    }
    std::string wrong = decode_frame(
        frame(row, i, buffer), dtype_bits(tensor_dtype(layout_, i)) / 8, out, &hash, checksum);
    if (wrong.empty() && layout_.kind == Kind::kLatents && i == 1) wrong = mask_problem(out);
    if (!wrong.empty()) file_.refuse(fmt::format("sample {} tensor {} {}", row, i, wrong));
  }
  if (hash.digest() != sample.tensor_xxh3) {
    file_.refuse(fmt::format("sample {} is damaged: XXH3 {:016x}, expected {:016x}",
                             row,
                             hash.digest(),
                             sample.tensor_xxh3));
  }
}

std::vector<std::vector<std::byte>> Segment::read(int64_t row, FrameChecksum checksum) const {
  if (row < 0 || row >= num_samples())
    throw std::invalid_argument(fmt::format("sample {} of {}", row, num_samples()));
  std::vector<std::vector<std::byte>> out;
  for (int i = 0; i < num_tensors(layout_, samples_[static_cast<size_t>(row)]); ++i) {
    out.emplace_back(
        static_cast<size_t>(tensor_bytes(layout_, samples_[static_cast<size_t>(row)], i)));
  }
  const std::vector<std::span<std::byte>> spans(out.begin(), out.end());
  read(row, spans, checksum);
  return out;
}

Record Segment::record(int64_t row) const {
  if (row < 0 || row >= num_samples())
    throw std::invalid_argument(fmt::format("sample {} of {}", row, num_samples()));
  Record out{samples_[static_cast<size_t>(row)], {}};
  for (int i = 0; i < num_tensors(layout_, out.info); ++i) {
    std::vector<std::byte> buffer;
    buffer.resize(frame(row, i, buffer).size());
    out.frames.push_back(std::move(buffer));
  }
  return out;
}

}  // namespace flux::cache
