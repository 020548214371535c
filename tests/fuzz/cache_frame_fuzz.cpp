// Any bytes as a chunk's frame: refused, or decoded to exactly the bytes asked for, which encode and
// decode to themselves. The first two bytes choose the size of an element and of the output.
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "formats/cache/codec.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux::cache;
  if (size < 2) return 0;
  constexpr int64_t kElementBytes[] = {1, 2, 4, 8};
  const int64_t element = kElementBytes[data[0] % 4];
  const auto frame = std::as_bytes(std::span(data, size)).subspan(2);
  std::vector<std::byte> out(static_cast<size_t>(element) * data[1]);
  if (!decode_frame(frame, element, out).empty()) return 0;
  std::vector<std::byte> again(out.size());
  if (!decode_frame(encode_frame(out, element), element, again).empty() || again != out)
    std::abort();
  return 0;
}
