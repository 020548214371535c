#include "formats/cache/codec.h"

#include <fmt/format.h>
#include <zstd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>

#include "common/core/hash.h"

namespace flux::cache {
namespace {

constexpr int kLevel =
    1;  // higher levels are slower and, on bf16 tensors, larger (reference figures in FORMAT.md)

// The length of the steps in which zstd looks for repeated bytes. In the noise that tensors are, those
// found byte by byte (kEverywhere) save nothing, but make the frame a third slower to decode.
enum class Search { kEverywhere = 0, kSeldom = 256 };
// ZSTD_c_literalCompressionMode, named only for static linking; 1: Huffman coding also with long steps
constexpr auto kLiterals = ZSTD_c_experimentalParam5;

// One context a thread: making one costs more than a small frame.
ZSTD_CCtx* compressor(Search search) {
  thread_local const std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> context = [] {
    ZSTD_CCtx* made = ZSTD_createCCtx();
    if (!made) throw std::bad_alloc();
    ZSTD_CCtx_setParameter(made, ZSTD_c_compressionLevel, kLevel);
    ZSTD_CCtx_setParameter(made, ZSTD_c_checksumFlag, 1);
    return std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)>(made, &ZSTD_freeCCtx);
  }();
  ZSTD_CCtx_setParameter(context.get(), ZSTD_c_targetLength, static_cast<int>(search));
  ZSTD_CCtx_setParameter(context.get(), kLiterals, search == Search::kSeldom);
  return context.get();
}

std::vector<std::byte> compress(std::span<const std::byte> data, Search search) {
  std::vector<std::byte> frame(ZSTD_compressBound(data.size()));
  const size_t size =
      ZSTD_compress2(compressor(search), frame.data(), frame.size(), data.data(), data.size());
  if (ZSTD_isError(size)) throw std::runtime_error(std::string("zstd: ") + ZSTD_getErrorName(size));
  frame.resize(size);
  return frame;
}

// ZSTD_d_forceIgnoreChecksum, which zstd.h (since 1.4.9) names only for static linking. A library that
// lacks it compares the checksum, which is slower and nothing else.
constexpr auto kIgnoreChecksum = ZSTD_d_experimentalParam3;

ZSTD_DCtx* decompressor(FrameChecksum checksum) {
  thread_local const std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context(ZSTD_createDCtx(),
                                                                                  &ZSTD_freeDCtx);
  if (!context) throw std::bad_alloc();
  ZSTD_DCtx_setParameter(context.get(), kIgnoreChecksum, checksum == FrameChecksum::kSkip);
  return context.get();
}

// Byte k of element i of `count` goes to k * count + i.
template <size_t kWidth>
void shuffle(const std::byte* from, std::byte* to, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    for (size_t k = 0; k < kWidth; ++k) to[k * count + i] = from[i * kWidth + k];
  }
}

// Elements first .. first + kCount - 1 back: a constant number of them, which the compiler turns into
// vector instructions at -O2.
template <class Word, size_t kCount>
void gather(const std::byte* __restrict from,
            std::byte* __restrict to,
            size_t count,
            size_t first) {
  for (size_t i = 0; i < kCount; ++i) {
    Word word = 0;
    for (size_t k = 0; k < sizeof(Word); ++k) {
      word =
          static_cast<Word>(word | std::to_integer<Word>(from[k * count + first + i]) << (8 * k));
    }
    std::memcpy(to + (first + i) * sizeof(Word), &word, sizeof word);
  }
}

// Undoes shuffle(), and hashes each block while it is in the cache.
template <class Word>
void unshuffle(const std::byte* from, std::span<std::byte> out, Xxh3* hash) {
  constexpr size_t kRun = 64, kBlock = 2048;  // elements
  const size_t count = out.size() / sizeof(Word);
  for (size_t begin = 0; begin < count; begin += kBlock) {
    const size_t end = std::min(count, begin + kBlock);
    size_t i = begin;
    for (; i + kRun <= end; i += kRun) gather<Word, kRun>(from, out.data(), count, i);
    for (; i < end; ++i) gather<Word, 1>(from, out.data(), count, i);
    if (hash) hash->add(out.subspan(begin * sizeof(Word), (end - begin) * sizeof(Word)));
  }
}

// Memory for the bytes before unshuffling, one a thread: fresh pages cost more than the decoding.
// Nothing is kept of a tensor that is much larger than usual.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (bytes <= kept().size) {
      data_ = kept().bytes.get();
    } else {
      own_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
      data_ = own_.get();
      if (bytes <= kLargestKept) kept() = {std::move(own_), bytes};
    }
  }
  std::byte* data() const { return data_; }

 private:
  static constexpr size_t kLargestKept = size_t{16} << 20;
  struct Kept {
    std::unique_ptr<std::byte[]> bytes;
    size_t size = 0;
  };
  static Kept& kept() {
    thread_local Kept one;
    return one;
  }
  std::unique_ptr<std::byte[]> own_;
  std::byte* data_ = nullptr;
};

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
  std::vector<std::byte> frame = compress(data, Search::kEverywhere);
  if (element_bytes == 2 || element_bytes == 4) {  // floats
    std::vector<std::byte> fast = compress(data, Search::kSeldom);
    if (fast.size() <= frame.size() + frame.size() / 100) frame = std::move(fast);
  }
  frame.shrink_to_fit();  // a segment's frames wait in memory; the bound is larger than the frame
                          // by half
  return frame;
}

std::string decode_frame(std::span<const std::byte> frame,
                         int64_t element_bytes,
                         std::span<std::byte> out,
                         Xxh3* hash,
                         FrameChecksum checksum) {
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

  const Scratch scratch(element_bytes > 1 ? out.size() : 0);
  std::byte* const target = element_bytes > 1 ? scratch.data() : out.data();
  const size_t size =
      ZSTD_decompressDCtx(decompressor(checksum), target, out.size(), frame.data(), frame.size());
  if (ZSTD_isError(size)) return fmt::format("is damaged: {}", ZSTD_getErrorName(size));
  if (size != out.size()) return fmt::format("decodes to {} bytes, expected {}", size, out.size());

  if (element_bytes == 2) unshuffle<uint16_t>(target, out, hash);
  if (element_bytes == 4) unshuffle<uint32_t>(target, out, hash);
  if (element_bytes == 8) unshuffle<uint64_t>(target, out, hash);
  if (element_bytes == 1 && hash) hash->add(out);
  return {};
}

}  // namespace flux::cache
