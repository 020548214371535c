// common/tokenizers/added_tokens.h - tokens that are found as literals in a text before anything
// else happens to it.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/tokenizers/trie.h"

namespace flux::tokenizers {

struct AddedToken {
  std::string content;
  int32_t id = 0;
  bool takes_space_before = false,
       takes_space_after = false;  // "lstrip" and "rstrip" in tokenizer.json
};

/// Finds added tokens, leftmost and longest first.
class AddedTokens {
 public:
  /// False if the content is empty or is there already.
  bool add(AddedToken token);

  /// A stretch of text, or a token.
  struct Part {
    std::string_view text;     // of the input; the literal if id is set
    int32_t id = Trie::kNone;  // kNone for text, which then is not empty
  };
  std::vector<Part> split(std::string_view text) const;

 private:
  std::vector<AddedToken> tokens_;
  Trie trie_;
};

/// What both tokenizers do with a text: tokens of `raw` become their ids, the stretches between are
/// normalised, tokens of `normalized` in those become their ids, and `encode(stretch)` appends the
/// ids of the rest.
template <class Normalize, class Encode>
void encode_around_tokens(const AddedTokens& raw,
                          const AddedTokens& normalized,
                          std::string_view text,
                          const Normalize& normalize,
                          const Encode& encode,
                          std::vector<int32_t>& ids) {
  for (const AddedTokens::Part& part : raw.split(text)) {
    if (part.id != Trie::kNone) {
      ids.push_back(part.id);
      continue;
    }
    const std::string clean = normalize(part.text);
    for (const AddedTokens::Part& inner : normalized.split(clean)) {
      if (inner.id != Trie::kNone) {
        ids.push_back(inner.id);
      } else {
        encode(inner.text);
      }
    }
  }
}

}  // namespace flux::tokenizers
