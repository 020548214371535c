#include "common/tokenizers/added_tokens.h"

#include <utility>

#include "common/tokenizers/unicode.h"

namespace flux::tokenizers {
namespace {

size_t skip_space(std::string_view text, size_t pos) {
  while (pos < text.size()) {
    size_t next = pos;
    if (char_class(next_code_point(text, next)) != CharClass::kSpace) break;
    pos = next;
  }
  return pos;
}

// Start of the white space that ends text[begin, end).
size_t space_before(std::string_view text, size_t begin, size_t end) {
  size_t start = end;
  while (start > begin) {
    size_t previous = start - 1;
    while (previous > begin && (static_cast<unsigned char>(text[previous]) & 0xC0) == 0x80)
      --previous;
    size_t after = previous;
    if (char_class(next_code_point(text, after)) != CharClass::kSpace) break;
    start = previous;
  }
  return start;
}

}  // namespace

bool AddedTokens::add(AddedToken token) {
  if (!trie_.insert(token.content, static_cast<int32_t>(tokens_.size()))) return false;
  tokens_.push_back(std::move(token));
  return true;
}

std::vector<AddedTokens::Part> AddedTokens::split(std::string_view text) const {
  std::vector<Part> parts;
  size_t done = 0;
  for (size_t pos = 0; pos < text.size();) {
    size_t length = 0;
    int32_t found = Trie::kNone;
    trie_.prefixes(text.substr(pos), [&](size_t n, int32_t token) { length = n, found = token; });
    if (found == Trie::kNone) {
      ++pos;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<size_t>(found)];
    const size_t begin = token.takes_space_before ? space_before(text, done, pos) : pos;
    pos += length;
    const size_t end = token.takes_space_after ? skip_space(text, pos) : pos;
    if (begin > done) parts.push_back({text.substr(done, begin - done)});
    parts.push_back({text.substr(begin, end - begin), token.id});
    pos = done = end;
  }
  if (done < text.size()) parts.push_back({text.substr(done)});
  return parts;
}

}  // namespace flux::tokenizers
