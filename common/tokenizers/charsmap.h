// common/tokenizers/charsmap.h - SentencePiece's compiled table of character replacements.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace flux::tokenizers {

/// Replaces characters by a precompiled charsmap: a Darts-clone double array over UTF-8 keys, whose
/// values are offsets into a pool of NUL-terminated replacements. Source: google/sentencepiece,
/// src/normalizer.cc.
class Charsmap {
 public:
  /// `blob`: u32 size of the array, the array, the pool; empty = nothing is replaced. Throws
  /// std::invalid_argument with the reason if the sizes or the pool are not well-formed.
  explicit Charsmap(std::string_view blob);

  /// `text` (UTF-8) with its replacements. Goes by grapheme cluster as HF's tokenizers does: a
  /// cluster below six bytes is replaced whole by its shortest key; else each code point is looked
  /// up alone.
  std::string normalize(std::string_view text) const;

 private:
  std::optional<std::string_view> replacement(std::string_view cluster) const;
  std::vector<uint32_t> units_;
  std::string pool_;
};

}  // namespace flux::tokenizers
