#include "formats/cache/codec.h"

#include <fmt/format.h>
#include <zstd.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace flux::cache {
namespace {

constexpr int kLevel =
    1;  // higher levels are slower and, on bf16 tensors, larger (reference figures in FORMAT.md)

// One context a thread: making one costs more than a small frame.
ZSTD_CCtx* compressor() {
  thread_local const std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> context = [] {
    ZSTD_CCtx* made = ZSTD_createCCtx();
    if (!made) throw std::bad_alloc();
    ZSTD_CCtx_setParameter(made, ZSTD_c_compressionLevel, kLevel);
    ZSTD_CCtx_setParameter(made, ZSTD_c_checksumFlag, 1);
    return std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)>(made, &ZSTD_freeCCtx);
  }();
  return context.get();
}

ZSTD_DCtx* decompressor() {
  thread_local const std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context(ZSTD_createDCtx(),
                                                                                  &ZSTD_freeDCtx);
  if (!context) throw std::bad_alloc();
  return context.get();
}

// The loops for 2 and 4 bytes have a constant stride, which the compiler turns into vector
// instructions.
template <size_t kWidth>
void shuffle(const std::byte* from, std::byte* to, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    for (size_t k = 0; k < kWidth; ++k) to[k * count + i] = from[i * kWidth + k];
  }
}
template <size_t kWidth>
void unshuffle(const std::byte* from, std::byte* to, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    for (size_t k = 0; k < kWidth; ++k) to[i * kWidth + k] = from[k * count + i];
  }
}

}  // namespace

std::vector<std::byte> encode_frame(std::span<const std::byte> data, int64_t element_bytes) {
  std::vector<std::byte> shuffled;
  if (element_bytes > 1) {
    shuffled.resize(data.size());
    const size_t count = data.size() / static_cast<size_t>(element_bytes);
    if (element_bytes == 2) shuffle<2>(data.data(), shuffled.data(), count);
    if (element_bytes == 4) shuffle<4>(data.data(), shuffled.data(), count);
    if (element_bytes == 8) shuffle<8>(data.data(), shuffled.data(), count);
    data = shuffled;
  }
  std::vector<std::byte> frame(ZSTD_compressBound(data.size()));
  const size_t size =
      ZSTD_compress2(compressor(), frame.data(), frame.size(), data.data(), data.size());
  if (ZSTD_isError(size)) throw std::runtime_error(std::string("zstd: ") + ZSTD_getErrorName(size));
  frame.resize(size);
  frame.shrink_to_fit();  // a segment's frames wait in memory; the bound is larger than the frame
                          // by half
  return frame;
}

std::string decode_frame(std::span<const std::byte> frame,
                         int64_t element_bytes,
                         std::span<std::byte> out) {
  const size_t length = ZSTD_findFrameCompressedSize(frame.data(), frame.size());
  const auto content = ZSTD_getFrameContentSize(frame.data(), frame.size());
  if (ZSTD_isError(length) || content == ZSTD_CONTENTSIZE_ERROR) return "is not a zstd frame";
  if (length != frame.size())
    return fmt::format("has {} bytes after its zstd frame", frame.size() - length);
  if (content == ZSTD_CONTENTSIZE_UNKNOWN) return "has a zstd frame without a content size";
  if (content != out.size())
    return fmt::format("decodes to {} bytes, expected {}", content, out.size());
  // RFC 8878, 3.1.1.1.1: bit 2 of the frame header's descriptor is the checksum flag
  if ((std::to_integer<unsigned>(frame[4]) & 4u) == 0) return "has a zstd frame without a checksum";
  if (ZSTD_getDictID_fromFrame(frame.data(), frame.size()) != 0)
    return "has a zstd frame that needs a dictionary";

  std::vector<std::byte> shuffled(element_bytes > 1 ? out.size() : 0);
  const std::span<std::byte> target = element_bytes > 1 ? std::span(shuffled) : out;
  const size_t size =
      ZSTD_decompressDCtx(decompressor(), target.data(), target.size(), frame.data(), frame.size());
  if (ZSTD_isError(size)) return fmt::format("is damaged: {}", ZSTD_getErrorName(size));
  if (size != out.size()) return fmt::format("decodes to {} bytes, expected {}", size, out.size());

  const size_t count = out.size() / static_cast<size_t>(element_bytes);
  if (element_bytes == 2) unshuffle<2>(shuffled.data(), out.data(), count);
  if (element_bytes == 4) unshuffle<4>(shuffled.data(), out.data(), count);
  if (element_bytes == 8) unshuffle<8>(shuffled.data(), out.data(), count);
  return {};
}

}  // namespace flux::cache
