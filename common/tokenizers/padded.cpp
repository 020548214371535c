#include "common/tokenizers/padded.h"

#include <algorithm>
#include <stdexcept>

namespace flux::tokenizers {

Padded pad_or_truncate(std::span<const int32_t> ids,
                       int64_t length,
                       int32_t eos_id,
                       int32_t pad_id) {
  if (length < 2) throw std::invalid_argument("pad_or_truncate: length is below 2");
  const auto size = static_cast<int64_t>(ids.size());
  const int64_t live = std::min(size, length);
  Padded out{{ids.begin(), ids.begin() + live}, live, size - live};
  if (size > length) out.ids.back() = eos_id;
  out.ids.resize(static_cast<size_t>(length), pad_id);
  return out;
}

}  // namespace flux::tokenizers
