#include "common/dataset/path_text.h"

#include <fmt/format.h>

#include <stdexcept>

#include "common/core/text.h"

namespace flux::dataset {
namespace {

int hex_digit(char c) {
  return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

}  // namespace

std::string path_text(std::string_view path_bytes) {
  std::string out;
  while (!path_bytes.empty()) {
    const auto bad = first_invalid_utf8(path_bytes);
    for (const char c : path_bytes.substr(0, bad.value_or(path_bytes.size()))) {
      out += c;
      if (c == '\\') out += c;
    }
    if (!bad) break;
    out += fmt::format("\\x{:02x}", static_cast<unsigned char>(path_bytes[*bad]));
    path_bytes.remove_prefix(*bad + 1);
  }
  return out;
}

std::string path_bytes(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\') {
      out += text[i];
    } else if (i + 1 < text.size() && text[i + 1] == '\\') {
      out += text[++i];
    } else if (i + 3 < text.size() && text[i + 1] == 'x' && hex_digit(text[i + 2]) >= 0 &&
               hex_digit(text[i + 3]) >= 0) {
      out += static_cast<char>(hex_digit(text[i + 2]) * 16 + hex_digit(text[i + 3]));
      i += 3;
    } else {
      throw std::invalid_argument("path_bytes: a backslash that starts no escape: " +
                                  printable(text));
    }
  }
  return out;
}

}  // namespace flux::dataset
