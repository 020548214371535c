// pipelines/text/nets.h - the two encoders as they lie on disk: weights (not loaded), sizes, tokenizer,
// identity.
#pragma once
#include <string>

#include "common/models/clip/clip.h"
#include "common/models/t5/stream.h"
#include "common/tokenizers/clip_bpe.h"
#include "common/tokenizers/t5_unigram.h"
#include "pipelines/text/options.h"

namespace flux::text {

struct ClipFiles {
  TensorMap weights;  // mapped
  clip::Config config;
  tokenizers::ClipTokenizer tokenizer;
  std::string weights_sha256, tokenizer_sha256;  // 64 hex digits
};
struct T5Files {
  t5::File weights;
  tokenizers::T5Tokenizer tokenizer;
  std::string weights_sha256, tokenizer_sha256;
};

/// Opens the weights and hashes them, if no earlier run has. Tokenizers that are not given are
/// looked for beside the weights: in a diffusers folder `tokenizer` (CLIP) and `tokenizer_2` (T5),
/// next to the weights' folder or in it, or in `tokenizers` as flux-model tiny writes them. Throws
/// InputError: unreadable, another net, a tokenizer with more ids than the weights have rows or
/// with another end token. UsageError if no tokenizer is given or found.
ClipFiles read_clip(const Options& options);
T5Files read_t5(const Options& options);

}  // namespace flux::text
