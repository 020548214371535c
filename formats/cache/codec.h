// formats/cache/codec.h - one frame: byte shuffle, then zstd level 1 with content size and
// checksum.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace flux {
class Xxh3;
}

namespace flux::cache {

/// What HDF5's filters 2 (shuffle) and 32015 (zstd) make of `data`, whose elements have
/// `element_bytes`. Bytes are grouped by their place in the element, which puts the exponents of
/// floats together; elements of one byte stay.
std::vector<std::byte> encode_frame(std::span<const std::byte> data, int64_t element_bytes);

/// Whether zstd's checksum of a frame is compared: not where the caller compares a hash of what was
/// decoded, since it takes a fifth of the decoding.
enum class FrameChecksum { kCompare, kSkip };

/// Decodes exactly out.size() bytes. Returns what is wrong, or an empty text: not one zstd frame,
/// no checksum, a dictionary, another content size, damaged. Adds what it decoded to `hash`, if given.
std::string decode_frame(std::span<const std::byte> frame,
                         int64_t element_bytes,
                         std::span<std::byte> out,
                         Xxh3* hash = nullptr,
                         FrameChecksum checksum = FrameChecksum::kCompare);

}  // namespace flux::cache
