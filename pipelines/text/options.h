// pipelines/text/options.h - the flags of flux-cache-text.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "pipelines/stage/options.h"

namespace flux::text {

/// T5's rows behind the last live token: as the net gives them (it attends to padding), or masked
/// out and zero.
enum class PadPolicy { kFull, kMasked };
std::string_view pad_policy_word(PadPolicy policy);  // "full", "masked"

/// An image without caption: end the run before encoding, or the empty caption.
enum class MissingCaption { kError, kEmpty };

inline constexpr int64_t kDefaultVariants = 8;

struct Options {
  stage::DatasetOptions data;
  std::filesystem::path prompts;  // one a line, instead of a data set
  std::filesystem::path t5, clip;
  std::filesystem::path t5_tokenizer, clip_tokenizer;  // empty: looked for beside the weights
  stage::EncodeOptions encode;
  int64_t t5_length_tokens = 512;  // 512 or 256
  PadPolicy pad_policy = PadPolicy::kFull;
  MissingCaption missing_caption = MissingCaption::kError;
  std::optional<int64_t>
      text_variants;  // of a caption with random parts; kDefaultVariants if not given
  int64_t device_memory = 0, host_memory = 0;  // bytes; 0: 90 % and 80 % of what is free
  int64_t seed = 0;                            // of captions with more outcomes than that
  std::string command_line;
};

void add_flags(Options& options, Tool& tool);
/// Throws UsageError.
void check(const Options& options);

}  // namespace flux::text
