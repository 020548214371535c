// common/data/prompts.h - the prompts of a text cache, for sampling.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "formats/cache/manifest.h"

namespace flux {

struct Prompt {
  std::string text;    // UTF-8, as encoded
  int64_t number = 0;  // of its item in the cache, from 0
  uint64_t id = 0;     // of the text: the same in any cache
};

/// A prompt as the transformer reads it, on the CPU, in the cache's dtype.
struct PromptEmbedding {
  at::Tensor prompt;  // [1, L, X], T5; L: the cache's, or with a mask the real tokens
  at::Tensor pooled;  // [1, V], CLIP
  at::Tensor mask;    // [1, L] bool, all true; undefined if padding is attended to
};

/// What `flux-cache-text --prompts` wrote; of a data set's text cache each caption once, items with several forms by the
/// first. Marks the cache as being read while it lives.
class Prompts {
 public:
  /// Throws CacheError: absent, damaged, a part of a cache.
  explicit Prompts(const std::filesystem::path& folder);
  ~Prompts();
  Prompts(const Prompts&) = delete;
  Prompts& operator=(const Prompts&) = delete;

  const std::filesystem::path& folder() const;
  const cache::Manifest& manifest() const;
  const std::vector<Prompt>& all() const { return prompts_; }
  int64_t t5_length() const;
  at::ScalarType type() const;
  bool masked() const;
  /// Throws CacheError for damage.
  PromptEmbedding load(const Prompt& prompt) const;

  /// The prompt whose text this is, also the empty caption of a data set; else, if it is a number, that of this number.
  /// Throws UsageError naming `flag` and some prompts.
  Prompt find(const std::string& text_or_number, const char* flag) const;

  /// Throws CacheError naming each field and both values if a transformer takes others. FLUX.1-dev and what has a guidance
  /// input takes 512 tokens, others 256 too.
  void require_fit(const std::filesystem::path& model,
                   int64_t prompt_dim,
                   int64_t pooled_dim,
                   bool guidance) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
  std::vector<Prompt> prompts_;
};

}  // namespace flux
