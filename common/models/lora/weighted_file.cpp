#include "common/models/lora/weighted_file.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <system_error>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::lora {

WeightedFile weighted_file(const std::string& text) {
  std::error_code ignored;
  const auto colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0 || std::filesystem::exists(text, ignored))
    return {text};
  double weight = 0;
  const char *const first = text.data() + colon + 1, *const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(first, last, weight);
  if (first == last || error != std::errc() || end != last) return {text};
  if (!std::isfinite(weight))
    throw UsageError(fmt::format("{}: the weight is not finite", printable(text)),
                     "1 is the LoRA as it was trained");
  return {text.substr(0, colon), weight};
}

}  // namespace flux::lora
