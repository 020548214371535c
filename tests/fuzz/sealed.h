// tests/fuzz/sealed.h - HDF5 files of any bytes whose superblock's size and checksums of metadata are made right as far as
// they can be found, so that what lies behind them is reached.
#pragma once
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "formats/cache/superblock.h"

namespace flux::fuzz {

/// Writes the checksum of the `length` bytes at `begin` behind them, if both are inside.
inline void seal(std::vector<uint8_t>& bytes, size_t begin, uint64_t length) {
  if (length > bytes.size() || begin > bytes.size() - length || bytes.size() - begin - length < 4)
    return;
  const uint32_t sum = flux::cache::lookup3(std::as_bytes(std::span(bytes)).subspan(begin, length));
  std::memcpy(bytes.data() + begin + length, &sum, sizeof sum);
}

inline uint64_t number(const std::vector<uint8_t>& bytes, size_t begin, size_t width) {
  uint64_t value = 0;
  for (size_t i = 0; i < width && begin + i < bytes.size(); ++i)
    value |= uint64_t{bytes[begin + i]} << (8 * i);
  return value;
}

/// Object headers of version 2 with their continuations, and fixed arrays (HDF5 File Format
// Specification 3.0, IV.A.1.b and VII.D).
inline void seal_metadata(std::vector<uint8_t>& bytes) {
  for (size_t at = 0; at + 28 < bytes.size(); ++at) {
    if (std::memcmp(&bytes[at], "OHDR", 4) == 0) {
      const uint8_t flags = bytes[at + 5];
      const size_t width = size_t{1} << (flags & 3);
      const size_t head = 6 + (flags & 0x20 ? 16 : 0) + (flags & 0x10 ? 4 : 0) + width;
      const uint64_t chunk =
          std::min<uint64_t>(number(bytes, at + head - width, width), bytes.size());
      const size_t message_head = flags & 4 ? 6 : 4;
      for (size_t m = at + head; m + message_head + 16 <= at + head + chunk;) {
        if (number(bytes, m, 1) == 0x10) {  // continuation: address and length with its checksum
          const uint64_t block = number(bytes, m + message_head, 8),
                         length = number(bytes, m + message_head + 8, 8);
          if (length >= 4) seal(bytes, block, length - 4);
        }
        m += message_head + number(bytes, m + 1, 2);
      }
      seal(bytes, at, head + chunk);
    } else if (std::memcmp(&bytes[at], "FAHD", 4) == 0) {
      const uint64_t entry = bytes[at + 6], count = number(bytes, at + 8, 8),
                     block = number(bytes, at + 16, 8);
      if (count < bytes.size()) seal(bytes, block, 14 + entry * count);
      seal(bytes, at, 24);
    }
  }
}

inline std::vector<uint8_t> sealed(const uint8_t* data, size_t size) {
  std::vector<uint8_t> bytes(data, data + size);
  if (size < cache::kSuperblockBytes) return bytes;
  const uint64_t end = size;
  std::memcpy(bytes.data() + 28, &end, sizeof end);
  const uint32_t sum = cache::lookup3(std::as_bytes(std::span(bytes)).first(44));
  std::memcpy(bytes.data() + 44, &sum, sizeof sum);
  seal_metadata(bytes);
  return bytes;
}

}  // namespace flux::fuzz
