// Any text as a manifest: refused, or equal to what writing it again gives.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "common/core/error.h"
#include "formats/cache/manifest.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux::cache;
  try {
    const Manifest manifest = parse_manifest({reinterpret_cast<const char*>(data), size}, "input");
    if (!same_content(parse_manifest(manifest_text(manifest), "again"), manifest)) std::abort();
  } catch (const flux::CacheError&) {
  }
  return 0;
}
