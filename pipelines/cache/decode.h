// pipelines/cache/decode.h - the tensors of samples that look_into() listed, as numbers.
#pragma once
#include <cstddef>
#include <filesystem>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "formats/cache/segment_reader.h"
#include "pipelines/cache/contents.h"

namespace flux::cache {

/// The segments of a folder, opened when needed; the 32 used last stay open. Thread-safe.
class Segments {
 public:
  explicit Segments(std::filesystem::path folder) : folder_(std::move(folder)) {}
  /// Throws CacheError naming the rule of FORMAT.md that the file breaks, or that it has changed
  /// since it was listed.
  std::shared_ptr<const Segment> of(const ListedSample& sample);

 private:
  std::filesystem::path folder_;
  std::mutex lock_;
  std::list<std::pair<std::string, std::shared_ptr<const Segment>>> open_;
};

/// One tensor of a sample.
struct NamedTensor {
  std::string name;  // "latents", or "mean" and "logvar"; "mask"; "t5", "clip"
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;    // [C, H, W]; [H, W]; [L, X], [V]
  std::vector<std::byte> bytes;  // row-major, little-endian
};
/// Decodes a sample; checks tensor_xxh3. Throws CacheError.
std::vector<NamedTensor> decode(Segments& segments, const ListedSample& sample);

/// bf16, f16 and f32 as float32, exactly.
std::vector<float> as_floats(const NamedTensor& tensor);

/// Throws CacheError unless the folder holds something and all of it can be read.
void require_readable(const Contents& contents);
/// Path or caption of a sample, for messages; its key where it has neither. Not printable() yet.
std::string sample_label(const ListedSample& sample, Kind kind);

}  // namespace flux::cache
