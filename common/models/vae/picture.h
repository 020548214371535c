// common/models/vae/picture.h - the activations of one picture, in memory or in a scratch file, by rows.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>

namespace flux {
class ScratchFile;
}

namespace flux::vae {

/// Where pictures are: in memory as long as they are `bytes` together, beyond that in scratch files.
class PictureMemory {
 public:
  explicit PictureMemory(int64_t bytes = INT64_MAX, std::filesystem::path scratch = {})
      : bytes_(bytes), scratch_(std::move(scratch)) {}
  PictureMemory(const PictureMemory&) = delete;
  PictureMemory& operator=(const PictureMemory&) = delete;

  bool fits(int64_t bytes) const { return bytes <= bytes_ - live_; }
  /// Of all pictures that went to scratch files.
  int64_t scratch_bytes() const { return scratch_bytes_; }

 private:
  friend class Picture;
  int64_t bytes_, live_ = 0, scratch_bytes_ = 0;
  std::filesystem::path scratch_;
};

/// [1, c, h, w], pixel after pixel (channels last). Copies share the values.
class Picture {
 public:
  Picture() = default;
  /// One that is in memory already; `memory`, which must outlive it, counts it.
  explicit Picture(at::Tensor x, PictureMemory* memory = nullptr);
  /// Room for one, wherever `memory` has it. Throws ResourceError, as ScratchFile does.
  Picture(PictureMemory& memory,
          int64_t channels,
          int64_t height,
          int64_t width,
          const at::TensorOptions& options);

  int64_t channels() const { return channels_; }
  int64_t height() const { return height_; }
  int64_t width() const { return width_; }
  int64_t num_bytes() const;
  at::TensorOptions options() const { return options_; }
  /// All of it, if it is in memory; else undefined.
  const at::Tensor& whole() const { return whole_; }

  /// Pixels [first, last) as [last - first, c]: a view, or read into `buffer`, which grows. Only of channels last.
  at::Tensor pixels(int64_t first, int64_t last, at::Tensor& buffer) const;
  /// Rows [first, last) as [1, c, last - first, w]; as pixels().
  at::Tensor rows(int64_t first, int64_t last, at::Tensor& buffer) const;
  void set_rows(int64_t first, const at::Tensor& rows);
  void add_rows(int64_t first, const at::Tensor& rows, at::Tensor& buffer);
  void reset() { *this = {}; }

 private:
  int64_t channels_ = 0, height_ = 0, width_ = 0;
  at::TensorOptions options_;
  at::Tensor whole_;
  std::shared_ptr<ScratchFile> file_;
  std::shared_ptr<void> counted_;  // gives the bytes back to the PictureMemory
};

}  // namespace flux::vae
