// Any bytes as a file of samples: refused, or read whole. See sealed.h.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/core/error.h"
#include "formats/samples/samples.h"
#include "tests/fuzz/sealed.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::vector<uint8_t> bytes = flux::fuzz::sealed(data, size);
  const int fd = memfd_create("input", MFD_CLOEXEC);
  if (fd < 0 || write(fd, bytes.data(), size) != static_cast<ssize_t>(size)) return 0;
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  try {
    const flux::samples::File file(path);
    for (int64_t i = 0; i < static_cast<int64_t>(file.pictures().size()); ++i) file.latents(i);
  } catch (const flux::CacheError&) {
  }
  close(fd);
  return 0;
}
