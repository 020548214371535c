// formats/samples/samples.h - samples.h5: latents of pictures with the prompts and settings that made them. FORMAT.md
// beside it is the norm.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "formats/cache/hdf5_file.h"
#include "formats/cache/schema.h"

namespace flux::samples {

inline constexpr char kFormat[] = "flux-samples";
inline constexpr int64_t kSchemaVersion = 1;                    // what is written
inline constexpr int64_t kOldestSchema = 1, kNewestSchema = 1;  // what is read
inline constexpr int64_t kChannels = 16;

/// What a file says of all its pictures.
struct Header {
  /// A flat object by flag name: model, schedule, steps, guidance, cfg-scale, lora, ... and, of pictures that a training
  /// made, step.
  nlohmann::json settings = nlohmann::json::object();
  std::string model_sha256{};  // weights_sha256 of the transformer, 64 hex digits; empty: not known
  cache::Provenance provenance{};
  std::string created{};  // UTC, RFC 3339
};

/// What a file says of one picture.
struct Info {
  std::string prompt, negative;  // as encoded; negative empty without CFG
  uint64_t prompt_number = 0;    // in its text cache, from 0
  uint64_t index = 0;            // of the pictures of a prompt, from 0
  uint64_t seed = 0;
  uint32_t height = 0, width = 0;  // latent rows and columns
};

/// A picture ready to be stored.
struct Record {
  Info info;
  std::vector<std::byte> frame;
};
/// `latents` [16, height, width], unscaled as in a latents cache. Throws std::invalid_argument for another number of
/// values.
Record prepare(const Info& info, std::span<const float> latents);

/// The bytes of a file; at least one record. Equal for equal arguments.
std::vector<std::byte> encode(const Header& header, std::span<const Record> records);

/// A file read. Every function throws CacheError naming the file and the rule of FORMAT.md that it breaks.
class File {
 public:
  explicit File(const std::filesystem::path& path);

  const Header& header() const { return header_; }
  std::span<const Info> pictures() const { return pictures_; }
  /// [16, height, width] of picture `i`.
  std::vector<float> latents(int64_t i) const;

 private:
  cache::Hdf5File file_;
  Header header_;
  std::vector<Info> pictures_;
  std::vector<uint32_t> rows_;
  std::map<std::pair<uint32_t, uint32_t>, std::shared_ptr<cache::Hdf5File::Frames>> frames_;
};

/// Whether the file is one of these, by its root attribute `format`; false for anything that cannot be opened as HDF5.
bool is_samples_file(const std::filesystem::path& path);

}  // namespace flux::samples
