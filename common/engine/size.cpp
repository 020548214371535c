#include "common/engine/size.h"

#include <charconv>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::engine {

std::pair<int64_t, int64_t> picture_size(const std::string& text) {
  const auto parts = split(text, 'x');
  const auto side = [&](std::string_view word) -> int64_t {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    if (error != std::errc() || end != word.data() + word.size() || value < 16 || value > 16384 ||
        value % 16 != 0)
      throw UsageError("'" + printable(text) +
                       "' is not a size such as 1024x768, in multiples of 16");
    return value;
  };
  if (parts.size() > 2)
    throw UsageError("'" + printable(text) + "' is not a size such as 1024x768");
  return {side(parts.front()), side(parts.size() == 1 ? parts.front() : parts.at(1))};
}

}  // namespace flux::engine
