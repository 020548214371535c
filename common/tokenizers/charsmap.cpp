#include "common/tokenizers/charsmap.h"

#include <cstring>
#include <stdexcept>

#include "common/core/text.h"
#include "common/tokenizers/unicode.h"

namespace flux::tokenizers {
namespace {

uint32_t unit_label(uint32_t unit) { return unit & 0x800000FFu; }
uint32_t unit_offset(uint32_t unit) { return (unit >> 10) << ((unit & 0x200u) >> 6); }
bool unit_has_leaf(uint32_t unit) { return ((unit >> 8) & 1u) != 0; }
uint32_t unit_value(uint32_t unit) { return unit & 0x7FFFFFFFu; }

}  // namespace

Charsmap::Charsmap(std::string_view blob) {
  if (blob.empty()) return;
  uint32_t array_bytes = 0;
  if (blob.size() < sizeof(array_bytes)) throw std::invalid_argument("the charsmap is cut short");
  std::memcpy(
      &array_bytes, blob.data(), sizeof(array_bytes));  // little-endian, as every machine here is
  blob.remove_prefix(sizeof(array_bytes));
  if (array_bytes == 0 || array_bytes % 4 != 0 || array_bytes > blob.size()) {
    throw std::invalid_argument("the charsmap's array size is not within the charsmap");
  }
  units_.resize(array_bytes / 4);
  std::memcpy(units_.data(), blob.data(), array_bytes);
  pool_ = blob.substr(array_bytes);
  if (first_invalid_utf8(pool_))
    throw std::invalid_argument("the charsmap's replacements are not UTF-8");
  if (!pool_.empty() && pool_.back() != '\0')
    throw std::invalid_argument("the charsmap's last replacement has no end");
  constexpr size_t kLongest =
      1024;  // the real one's longest is 33 bytes; bounds what a bad file can blow a text up to
  for (size_t begin = 0; begin < pool_.size();) {
    const size_t end = pool_.find('\0', begin);
    if (end - begin > kLongest)
      throw std::invalid_argument("the charsmap has a replacement above 1024 bytes");
    begin = end + 1;
  }
}

std::optional<std::string_view> Charsmap::replacement(std::string_view cluster) const {
  if (units_.empty()) return std::nullopt;
  size_t pos = unit_offset(units_[0]);
  for (const char c : cluster) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte == 0) return std::nullopt;  // 0 marks a key's end in the array
    pos ^= byte;
    if (pos >= units_.size() || unit_label(units_[pos]) != byte) return std::nullopt;
    const uint32_t unit = units_[pos];
    pos ^= unit_offset(unit);
    if (!unit_has_leaf(unit)) continue;
    if (pos >= units_.size()) return std::nullopt;
    const size_t begin = unit_value(units_[pos]);
    const bool inside_code_point =
        begin < pool_.size() && (static_cast<unsigned char>(pool_[begin]) & 0xC0) == 0x80;
    if (begin >= pool_.size() || inside_code_point) return std::nullopt;
    return std::string_view(pool_.data() + begin);  // up to the NUL
  }
  return std::nullopt;
}

std::string Charsmap::normalize(std::string_view text) const {
  constexpr size_t kShortCluster = 6;
  std::string out;
  out.reserve(text.size());
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = grapheme_end(text, begin);
    const std::string_view cluster = text.substr(begin, end - begin);
    begin = end;
    if (cluster.size() < kShortCluster) {
      if (const auto whole = replacement(cluster)) {
        out += *whole;
        continue;
      }
    }
    for (size_t pos = 0; pos < cluster.size();) {
      const size_t start = pos;
      next_code_point(cluster, pos);
      const std::string_view single = cluster.substr(start, pos - start);
      out += replacement(single).value_or(single);
    }
  }
  return out;
}

}  // namespace flux::tokenizers
