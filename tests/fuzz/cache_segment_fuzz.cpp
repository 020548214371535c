// Any bytes as a segment and as an index: refused, or read whole. See sealed.h.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/core/error.h"
#include "formats/cache/index.h"
#include "formats/cache/segment_reader.h"
#include "tests/fuzz/sealed.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux::cache;
  const std::vector<uint8_t> bytes = flux::fuzz::sealed(data, size);
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
