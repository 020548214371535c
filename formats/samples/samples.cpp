#include "formats/samples/samples.h"

#include <fmt/format.h>

#include <array>
#include <set>
#include <stdexcept>
#include <utility>

#include "common/core/error.h"
#include "common/core/text.h"
#include "formats/cache/codec.h"
#include "formats/cache/header.h"
#include "formats/cache/manifest.h"
#include "formats/cache/tables.h"

namespace flux::samples {
namespace {

using cache::canonical_json;
using cache::Element;
using cache::Hdf5File;
using cache::Hdf5Image;

constexpr int64_t kMaxPictures = int64_t{1} << 24;

std::string dataset_name(uint32_t height, uint32_t width) {
  return fmt::format("latents_{}x{}", height, width);
}

nlohmann::json object_attribute(const Hdf5File& file, const std::string& name) {
  const auto value = nlohmann::json::parse(file.text_attribute(name), nullptr, false);
  if (!value.is_object()) file.refuse(fmt::format("root attribute '{}' is no JSON object", name));
  return value;
}

}  // namespace

Record prepare(const Info& info, std::span<const float> latents) {
  if (std::ssize(latents) != kChannels * info.height * info.width)
    throw std::invalid_argument(fmt::format("{} values for latents of {} rows and {} columns",
                                            latents.size(),
                                            info.height,
                                            info.width));
  return {info, cache::encode_frame(std::as_bytes(latents), sizeof(float))};
}

std::vector<std::byte> encode(const Header& header, std::span<const Record> records) {
  if (records.empty()) throw std::invalid_argument("a file of no samples");
  Hdf5Image image;
  image.attribute("format", kFormat);
  image.attribute("schema_version", kSchemaVersion);
  image.attribute("num_samples", static_cast<int64_t>(records.size()));
  image.attribute("settings", canonical_json(header.settings));
  image.attribute("model_sha256", header.model_sha256);
  cache::write_provenance(image, header.provenance, header.created);

  std::map<std::pair<uint32_t, uint32_t>, std::vector<std::span<const std::byte>>> sizes;
  std::vector<uint32_t> rows;
  for (const Record& record : records) {
    auto& frames = sizes[{record.info.height, record.info.width}];
    rows.push_back(static_cast<uint32_t>(frames.size()));
    frames.emplace_back(record.frame);
  }
  const auto column = [&](const char* name, auto get) {
    cache::write_column(image, std::string("samples_") + name, records, [&](const Record& record) {
      return get(record.info);
    });
  };
  column("bucket", [](const Info& s) { return std::array{s.height, s.width}; });
  cache::write_column(
      image, "samples_row", std::span<const uint32_t>(rows), [](uint32_t row) { return row; });
  column("prompt_number", [](const Info& s) { return s.prompt_number; });
  column("index", [](const Info& s) { return s.index; });
  column("seed", [](const Info& s) { return s.seed; });
  const auto texts = [&](const char* name, auto get) {
    cache::write_texts(image, name, records.size(), [&](size_t i) { return get(records[i].info); });
  };
  texts("samples_prompt", [](const Info& s) { return s.prompt; });
  texts("samples_negative", [](const Info& s) { return s.negative; });
  for (const auto& [size, frames] : sizes)
    image.frames(dataset_name(size.first, size.second),
                 Element::kF32,
                 std::array<int64_t, 4>{
                     static_cast<int64_t>(frames.size()), kChannels, size.first, size.second},
                 frames);
  return image.finish();
}

File::File(const std::filesystem::path& path) : file_(path) {
  const auto format = file_.attributes().find("format");
  if (format == file_.attributes().end() ||
      format->second != cache::AttributeValue(std::string(kFormat)))
    file_.refuse("is no file of samples (root attribute 'format')",
                 "flux-sample and flux-train --sample-every write them");
  const int64_t schema = file_.number_attribute("schema_version");
  if (schema < kOldestSchema || schema > kNewestSchema)
    file_.refuse(fmt::format("schema {}, this build reads {} to {}\n  written by {} {}",
                             schema,
                             kOldestSchema,
                             kNewestSchema,
                             printable(file_.text_attribute("tool")),
                             printable(file_.text_attribute("tool_version"))),
                 "sample again with this version, or use a newer one of these tools");
  file_.refuse_oddities();
  header_.settings = object_attribute(file_, "settings");
  header_.model_sha256 = file_.text_attribute("model_sha256");
  header_.provenance = {file_.text_attribute("tool"),
                        file_.text_attribute("tool_version"),
                        file_.text_attribute("command_line"),
                        file_.text_attribute("device")};
  header_.created = file_.text_attribute("created");
  const int64_t count = file_.number_attribute("num_samples");
  if (count < 1 || count > kMaxPictures)
    file_.refuse(fmt::format("root attribute 'num_samples' is {}", count));
  pictures_.resize(static_cast<size_t>(count));
  rows_.resize(pictures_.size());
  const std::span<Info> all(pictures_);
  cache::read_column<std::array<uint32_t, 2>>(
      file_, "samples_bucket", all, [](Info& s, const auto& value) {
        s.height = value[0];
        s.width = value[1];
      });
  cache::read_column<uint32_t>(
      file_, "samples_row", std::span(rows_), [](uint32_t& row, uint32_t value) { row = value; });
  cache::read_column<uint64_t>(
      file_, "samples_prompt_number", all, [](Info& s, uint64_t v) { s.prompt_number = v; });
  cache::read_column<uint64_t>(
      file_, "samples_index", all, [](Info& s, uint64_t v) { s.index = v; });
  cache::read_column<uint64_t>(file_, "samples_seed", all, [](Info& s, uint64_t v) { s.seed = v; });
  constexpr int64_t kMaxTextBytes = int64_t{1} << 30;
  const auto prompts = cache::read_texts(file_, "samples_prompt", pictures_.size(), kMaxTextBytes);
  const auto negatives =
      cache::read_texts(file_, "samples_negative", pictures_.size(), kMaxTextBytes);
  std::map<std::pair<uint32_t, uint32_t>, int64_t> counts;
  for (size_t i = 0; i < pictures_.size(); ++i) {
    Info& picture = pictures_[i];
    picture.prompt = prompts.at(i);
    picture.negative = negatives.at(i);
    if (picture.height == 0 || picture.width == 0 || picture.height > cache::kMaxLatentSide ||
        picture.width > cache::kMaxLatentSide ||
        kChannels * picture.height * picture.width * int64_t{sizeof(float)} >
            cache::kMaxTensorBytes)
      file_.refuse(fmt::format(
          "picture {} has latents of {} rows and {} columns", i, picture.height, picture.width));
    if (rows_[i] != counts[{picture.height, picture.width}]++)
      file_.refuse(fmt::format("'samples_row' of picture {} is {}", i, rows_[i]));
  }
  for (const auto& [size, number] : counts)
    frames_[size] =
        file_.open_frames(dataset_name(size.first, size.second),
                          Element::kF32,
                          std::array<int64_t, 4>{number, kChannels, size.first, size.second});
}

std::vector<float> File::latents(int64_t i) const {
  const Info& picture = pictures_[static_cast<size_t>(i)];
  std::vector<float> out(static_cast<size_t>(kChannels) * picture.height * picture.width);
  std::vector<std::byte> buffer;
  const auto bytes = std::as_writable_bytes(std::span(out));
  const auto frame = file_.frame(*frames_.at({picture.height, picture.width}),
                                 rows_[static_cast<size_t>(i)],
                                 std::ssize(bytes),
                                 buffer);
  if (const std::string problem = cache::decode_frame(frame, sizeof(float), bytes);
      !problem.empty())
    file_.refuse(fmt::format("the latents of picture {}: {}", i, problem));
  return out;
}

bool is_samples_file(const std::filesystem::path& path) {
  try {
    const Hdf5File file(path);
    const auto format = file.attributes().find("format");
    return format != file.attributes().end() &&
           format->second == cache::AttributeValue(std::string(kFormat));
  } catch (const Error&) {
    return false;
  }
}

}  // namespace flux::samples
