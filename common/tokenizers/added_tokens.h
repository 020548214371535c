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

}  // namespace flux::tokenizers
