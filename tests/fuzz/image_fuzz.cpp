// Any bytes as a picture: refused, or decoded to as many pixels as its head says, in both profiles.
#include <cstdint>
#include <cstdlib>
#include <span>

#include "common/core/error.h"
#include "common/image/image.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux;
  const auto file = std::as_bytes(std::span(data, size));
  for (const auto profile : {Profile::kDefault, Profile::kKohya}) {
    try {
      const auto header = image::read_header(file);
      if (header.size.width > (1 << 22) / header.size.height) return 0;  // real, but slow
      const auto picture = image::decode(file, {profile, {1, 2, 3}});
      const auto pixels = static_cast<size_t>(picture.size.width * picture.size.height);
      if (picture.size != header.decoded_size(profile) || picture.data.size() != 3 * pixels)
        std::abort();
    } catch (const InputError&) {
    }
  }
  return 0;
}
