#include "common/tokenizers/byte_symbols.h"

#include "common/tokenizers/unicode.h"

namespace flux::tokenizers {
namespace {

bool stands_for_itself(int byte) {
  return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

}  // namespace

std::string byte_symbol(unsigned char byte) {
  char32_t code_point = byte;
  if (!stands_for_itself(byte)) {
    code_point = 0x100;
    for (int other = 0; other < byte; ++other) code_point += stands_for_itself(other) ? 0 : 1;
  }
  std::string out;
  append_code_point(out, code_point);
  return out;
}

std::vector<unsigned char> bytes_in_id_order() {
  std::vector<unsigned char> bytes;
  for (const bool wanted : {true, false}) {
    for (int byte = 0; byte < 256; ++byte) {
      if (stands_for_itself(byte) == wanted) bytes.push_back(static_cast<unsigned char>(byte));
    }
  }
  return bytes;
}

}  // namespace flux::tokenizers
