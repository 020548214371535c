// Any bytes as a segment and as an index: refused, or read whole. The superblock's size and all
// checksums of metadata that can be found are made right, so that what lies behind them is reached.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "common/core/error.h"
#include "formats/cache/index.h"
#include "formats/cache/segment_reader.h"
#include "formats/cache/superblock.h"

namespace {

// Writes the checksum of the `length` bytes at `begin` behind them, if both are inside.
void seal(std::vector<uint8_t>& bytes, size_t begin, uint64_t length) {
  if (length > bytes.size() || begin > bytes.size() - length || bytes.size() - begin - length < 4)
    return;
  const uint32_t sum = flux::cache::lookup3(std::as_bytes(std::span(bytes)).subspan(begin, length));
  std::memcpy(bytes.data() + begin + length, &sum, sizeof sum);
}

uint64_t number(const std::vector<uint8_t>& bytes, size_t begin, size_t width) {
  uint64_t value = 0;
  for (size_t i = 0; i < width && begin + i < bytes.size(); ++i)
    value |= uint64_t{bytes[begin + i]} << (8 * i);
  return value;
}

// Object headers of version 2 with their continuations, and fixed arrays (HDF5 File Format
// Specification 3.0, IV.A.1.b and VII.D).
void seal_metadata(std::vector<uint8_t>& bytes) {
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

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux::cache;
  std::vector<uint8_t> bytes(data, data + size);
  if (size >= kSuperblockBytes) {
    const uint64_t end = size;
    std::memcpy(bytes.data() + 28, &end, sizeof end);
    const uint32_t sum = lookup3(std::as_bytes(std::span(bytes)).first(44));
    std::memcpy(bytes.data() + 44, &sum, sizeof sum);
    seal_metadata(bytes);
  }
  const int fd = memfd_create("input", MFD_CLOEXEC);
  if (fd < 0 || write(fd, bytes.data(), size) != static_cast<ssize_t>(size)) return 0;
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  try {
    const Segment segment(path);
    for (int64_t i = 0; i < segment.num_samples(); ++i) segment.read(i);
  } catch (const flux::CacheError&) {
  }
  for (const Kind kind : {Kind::kLatents, Kind::kText}) {
    try {
      const Index index = read_index(path, kind);
      size_t sum = 0;
      for (int64_t i = 0; i < index.num_items(); ++i)
        sum += index.path(i).size() + index.variants(i).size();
      asm volatile("" ::"r"(sum));  // keeps the reads
    } catch (const flux::CacheError&) {
    }
  }
  close(fd);
  return 0;
}
