// common/tokenizers/tiny.h - small vocabularies of the project's own, for tests, the demo and
// flux-model tiny.
#pragma once
#include <filesystem>
#include <string>

namespace flux::tokenizers {

/// The bytes of a SentencePiece unigram model: 0 <pad>, 1 </s>, 2 <unk>, then U+2581, printable
/// ASCII and common English words, with a charsmap that maps a few compatibility characters, and
/// SentencePiece's white space rules. The Python sentencepiece and transformers libraries read it.
/// The same bytes on every machine.
std::string tiny_t5_model();
/// The bytes of vocab.json and merges.txt in CLIP's structure: 256 byte symbols, the same with
/// "</w>", a merge a line in order, then "<|startoftext|>" and "<|endoftext|>".
std::string tiny_clip_vocab();
std::string tiny_clip_merges();

/// Writes t5/spiece.model, clip/vocab.json and clip/merges.txt below `folder`, making folders as
/// needed. Throws ResourceError if that fails.
void write_tiny_tokenizers(const std::filesystem::path& folder);

}  // namespace flux::tokenizers
