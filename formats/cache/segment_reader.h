// formats/cache/segment_reader.h - one segment: tables checked and read at once, tensors on
// request.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

#include "formats/cache/codec.h"
#include "formats/cache/hdf5_file.h"
#include "formats/cache/schema.h"
#include "formats/cache/segment_writer.h"

namespace flux::cache {

/// Every function throws CacheError naming the file and the first rule of FORMAT.md that it breaks.
/// Thread-safe.
class Segment {
 public:
  explicit Segment(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return file_.path(); }
  const SegmentHeader& header() const { return header_; }
  const Layout& layout() const { return layout_; }
  int64_t num_samples() const { return static_cast<int64_t>(samples_.size()); }
  std::span<const SampleInfo> samples() const { return samples_; }

  /// Decodes sample `row` into `tensors`, whose sizes must be tensor_bytes(); verifies tensor_xxh3
  /// and, unless told to skip it, the checksum of each frame.
  void read(int64_t row,
            std::span<const std::span<std::byte>> tensors,
            FrameChecksum checksum = FrameChecksum::kCompare) const;
  std::vector<std::vector<std::byte>> read(int64_t row,
                                           FrameChecksum checksum = FrameChecksum::kCompare) const;
  /// The sample with its frames as they are stored, for copying into another segment.
  Record record(int64_t row) const;

 private:
  void open_latents();
  void open_text();
  std::span<const std::byte> frame(int64_t row, int which, std::vector<std::byte>& buffer) const;

  Hdf5File file_;
  SegmentHeader header_;
  Layout layout_;
  std::vector<SampleInfo> samples_;
  struct Place {
    std::shared_ptr<Hdf5File::Frames> frames;
    int64_t row = 0;
  };
  std::vector<std::vector<Place>> places_;  // of each sample's tensors
};

}  // namespace flux::cache
