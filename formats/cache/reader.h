// formats/cache/reader.h - a whole cache, read: manifest, index and the samples of its segments.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

#include "formats/cache/index.h"
#include "formats/cache/manifest.h"
#include "formats/cache/schema.h"

namespace flux::cache {

/// A sample with its decoded tensors: latents [channels, height, width]; or T5 [L, X] and CLIP [V].
/// Little-endian.
struct Sample {
  SampleInfo info;
  std::vector<std::vector<std::byte>> tensors;
};

/// Opens the manifest and the index, no segments. Reading is thread-safe; decompression runs
/// outside HDF5's lock. At most 128 segments are open at once.
///
/// Every function throws CacheError naming the file and the first rule of FORMAT.md that it breaks:
/// also where a segment is absent, has another size than the manifest says, or another key than the
/// index says.
class Cache {
 public:
  /// Throws CacheError also if the cache is of another kind.
  Cache(const std::filesystem::path& folder, Kind kind);
  ~Cache();
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  const std::filesystem::path& folder() const;
  const Manifest& manifest() const;
  const Index& index() const;
  const Layout& layout() const;

  /// Decodes into `tensors`, whose sizes must be tensor_bytes(layout(), ...) of the sample
  /// (std::invalid_argument).
  SampleInfo read_into(const IndexVariant& variant,
                       std::span<const std::span<std::byte>> tensors) const;
  Sample read(const IndexVariant& variant) const;
  /// The tables' row alone.
  SampleInfo info(const IndexVariant& variant) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// How the samples of a folder were made last: the parameters of its manifest; without one, of the
/// newest segment or journal (by the time that it says it was made at); an empty object if nothing
/// can be read.
nlohmann::json newest_parameters(const std::filesystem::path& folder);

}  // namespace flux::cache
