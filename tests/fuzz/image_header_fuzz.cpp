// Any bytes as the head of a picture: refused, or a size that a picture may have, without decoding.
#include <cstdint>
#include <cstdlib>
#include <span>

#include "common/core/error.h"
#include "common/image/image.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux;
  try {
    const auto header = image::read_header(std::as_bytes(std::span(data, size)));
    if (header.size.width < 1 || header.size.height < 1) std::abort();
    for (const auto profile : {Profile::kDefault, Profile::kKohya}) {
      const auto turned = header.decoded_size(profile);
      if (turned.width * turned.height != header.size.width * header.size.height) std::abort();
    }
  } catch (const InputError&) {
  }
  return 0;
}
