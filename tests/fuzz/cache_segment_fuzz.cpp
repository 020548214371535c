// Any bytes as a segment and as an index: refused, or read whole. The superblock's checksum and
// size are made right, so that what lies behind them is reached.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "common/core/error.h"
#include "formats/cache/index.h"
#include "formats/cache/segment_reader.h"
#include "formats/cache/superblock.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux::cache;
  std::vector<uint8_t> bytes(data, data + size);
  if (size >= kSuperblockBytes) {
    const uint64_t end = size;
    std::memcpy(bytes.data() + 28, &end, sizeof end);
    const uint32_t sum = lookup3(std::as_bytes(std::span(bytes)).first(44));
    std::memcpy(bytes.data() + 44, &sum, sizeof sum);
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
