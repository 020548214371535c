// common/tokenizers/clip_bpe.h - CLIP's byte-pair vocabulary, with the ids of the HF fast
// tokenizer.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "common/core/hash.h"
#include "common/tokenizers/padded.h"

namespace flux::tokenizers {

/// Text to CLIP-L token ids: NFC, white space runs to one space, lower case by code point, words,
/// byte pairs.
///
/// The ids are those of transformers' CLIPTokenizerFast ("fast" cleaning: nothing is removed, curly
/// quotes stay). A literal "<|endoftext|>" in a caption becomes that token, in any letter case, as
/// there. Source: openai/CLIP, clip/simple_tokenizer.py; Sennrich et al. 2016, arXiv:1508.07909
/// (byte pairs).
class ClipTokenizer {
 public:
  /// Reads a folder that holds vocab.json and merges.txt, or else tokenizer.json; or a
  /// tokenizer.json itself. Throws InputError that names the file and the reason.
  static ClipTokenizer load(const std::filesystem::path& path);
  /// The same of the bytes of vocab.json and merges.txt, or of tokenizer.json; `name` stands for
  /// them in messages.
  static ClipTokenizer parse(std::string_view vocab,
                             std::string_view merges,
                             const std::filesystem::path& name);
  static ClipTokenizer parse_json(std::string_view bytes, const std::filesystem::path& name);
  ClipTokenizer(ClipTokenizer&&) noexcept;
  ClipTokenizer& operator=(ClipTokenizer&&) noexcept;
  ~ClipTokenizer();

  /// All ids of `utf8`, bos first and eos last, neither padded nor truncated. Takes time n log n in
  /// the length. Safe to call from several threads. Throws InputError with the offset of the first
  /// bad byte if `utf8` is not well-formed UTF-8: nothing is replaced or skipped.
  std::vector<int32_t> encode(std::string_view utf8) const;
  /// encode()'s ids at `length` (77), filled with pad_id().
  Padded padded(std::span<const int32_t> ids, int64_t length) const;

  /// One more than the largest id: 49408 for CLIP-L.
  int64_t vocab_size() const;
  int32_t bos_id() const;
  int32_t eos_id() const;  // also the id of what the vocabulary does not know
  int32_t pad_id() const;  // eos, as CLIP-L pads
  /// SHA-256 over the bytes of the files read, vocab.json before merges.txt: the tokenizer's part
  /// of a cache key.
  const Sha256Digest& sha256() const;

 private:
  struct Model;
  explicit ClipTokenizer(std::unique_ptr<const Model> model);
  std::unique_ptr<const Model> model_;
};

}  // namespace flux::tokenizers
