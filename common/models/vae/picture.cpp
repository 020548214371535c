#include "common/models/vae/picture.h"

#include <ATen/ATen.h>

#include <span>
#include <utility>

#include "common/core/scratch_file.h"

namespace flux::vae {
namespace {

int64_t element_bytes(const at::TensorOptions& options) {
  return static_cast<int64_t>(options.dtype().itemsize());
}

/// The first elements of `buffer`, made larger where it must be, as [pixels, channels].
at::Tensor in_buffer(at::Tensor& buffer,
                     int64_t pixels,
                     int64_t channels,
                     const at::TensorOptions& options) {
  const int64_t size = pixels * channels;
  if (!buffer.defined() || buffer.numel() < size) {
    buffer.reset();  // before the larger one is made
    buffer = at::empty({size}, options);
  }
  return buffer.narrow(0, 0, size).view({pixels, channels});
}

std::span<std::byte> bytes_of(const at::Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.mutable_data_ptr()), tensor.nbytes()};
}

}  // namespace

Picture::Picture(at::Tensor x, PictureMemory* memory)
    : channels_(x.size(1)),
      height_(x.size(2)),
      width_(x.size(3)),
      options_(x.options()),
      whole_(std::move(x)) {
  if (!memory) return;
  memory->live_ += num_bytes();
  counted_ = std::shared_ptr<void>(
      nullptr, [memory, bytes = num_bytes()](void*) { memory->live_ -= bytes; });
}

Picture::Picture(PictureMemory& memory,
                 int64_t channels,
                 int64_t height,
                 int64_t width,
                 const at::TensorOptions& options)
    : channels_(channels), height_(height), width_(width), options_(options) {
  if (memory.fits(num_bytes())) {
    *this = Picture(
        at::empty({1, channels, height, width}, options, at::MemoryFormat::ChannelsLast), &memory);
    return;
  }
  file_ = std::make_shared<ScratchFile>(memory.scratch_, "activations");
  file_->reserve(num_bytes());
  memory.scratch_bytes_ += num_bytes();
}

int64_t Picture::num_bytes() const {
  return channels_ * height_ * width_ * element_bytes(options_);
}

at::Tensor Picture::pixels(int64_t first, int64_t last, at::Tensor& buffer) const {
  if (whole_.defined())
    return whole_.permute({0, 2, 3, 1})
        .view({height_ * width_, channels_})
        .narrow(0, first, last - first);
  const at::Tensor out = in_buffer(buffer, last - first, channels_, options_);
  file_->read(first * channels_ * element_bytes(options_), bytes_of(out));
  return out;
}

at::Tensor Picture::rows(int64_t first, int64_t last, at::Tensor& buffer) const {
  if (whole_.defined()) return whole_.narrow(2, first, last - first);
  return pixels(first * width_, last * width_, buffer)
      .view({1, last - first, width_, channels_})
      .permute({0, 3, 1, 2});
}

void Picture::set_rows(int64_t first, const at::Tensor& rows) {
  if (whole_.defined()) {
    whole_.narrow(2, first, rows.size(2)).copy_(rows);
    return;
  }
  const at::Tensor values = rows.permute({0, 2, 3, 1}).contiguous();
  file_->write(first * width_ * channels_ * element_bytes(options_), bytes_of(values));
}

void Picture::add_rows(int64_t first, const at::Tensor& rows, at::Tensor& buffer) {
  if (whole_.defined()) {
    whole_.narrow(2, first, rows.size(2)).add_(rows);
    return;
  }
  set_rows(first, this->rows(first, first + rows.size(2), buffer).add_(rows));
}

}  // namespace flux::vae
