// Any bytes as a writer's lock: respected with a CacheError, or taken over; never both, never lost.
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string_view>

#include "common/core/error.h"
#include "common/core/file.h"
#include "formats/cache/lock.h"
#include "tests/support/temporary_folder.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux;
  static const test::TemporaryFolder folder;
  const auto path = folder.write(".writer.lock", {reinterpret_cast<const char*>(data), size});
  try {
    const cache::WriterLock lock(folder.path());
    if (!std::filesystem::exists(path)) std::abort();
  } catch (const CacheError&) {
    if (!std::filesystem::exists(path)) std::abort();
    return 0;
  }
  if (std::filesystem::exists(path)) std::abort();  // released
  return 0;
}
