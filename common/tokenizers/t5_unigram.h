// common/tokenizers/t5_unigram.h - T5's SentencePiece vocabulary, with the ids of the HF fast
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

/// Text to T5 token ids: charsmap normalisation by grapheme, white space to U+2581, Viterbi over
/// the unigram scores.
///
/// The ids are those of transformers' T5TokenizerFast, which the reference trainer and diffusers
/// use; the sentencepiece library differs on special tokens in text, stacked accents and ties. A
/// literal "</s>" or "<extra_id_0>" in a caption becomes that token, as there. Source:
/// google/sentencepiece, src/unigram_model.cc; Kudo 2018, arXiv:1804.10959 (unigram language model).
class T5Tokenizer {
 public:
  /// Reads a SentencePiece model ("spiece.model"), a HF "tokenizer.json" (told apart by their
  /// bytes), or a folder that holds one of the two, looked for in that order. Throws InputError
  /// that names the file and the reason: absent, truncated, not a unigram model, or a normaliser
  /// that this pipeline does not follow.
  static T5Tokenizer load(const std::filesystem::path& path);
  /// The same of a file's bytes; `name` stands for it in messages.
  static T5Tokenizer parse(std::string_view bytes, const std::filesystem::path& name);
  T5Tokenizer(T5Tokenizer&&) noexcept;
  T5Tokenizer& operator=(T5Tokenizer&&) noexcept;
  ~T5Tokenizer();

  /// All ids of `utf8` with the final eos, neither padded nor truncated; the empty text is {eos}.
  /// Takes time linear in the length. Safe to call from several threads. Throws InputError with the
  /// offset of the first bad byte if `utf8` is not well-formed UTF-8: nothing is replaced or
  /// skipped.
  std::vector<int32_t> encode(std::string_view utf8) const;
  /// encode()'s ids at `length` (512 or 256 in FLUX), filled with pad_id().
  Padded padded(std::span<const int32_t> ids, int64_t length) const;

  /// One more than the largest id: 32100 for T5 (pieces and 100 sentinels). The embedding needs at
  /// least as many rows.
  int64_t vocab_size() const;
  int32_t pad_id() const;
  int32_t eos_id() const;
  int32_t unk_id() const;
  /// SHA-256 of the bytes of the file read: the tokenizer's part of a cache key.
  const Sha256Digest& sha256() const;

 private:
  struct Model;
  explicit T5Tokenizer(std::unique_ptr<const Model> model);
  std::unique_ptr<const Model> model_;
};

}  // namespace flux::tokenizers
