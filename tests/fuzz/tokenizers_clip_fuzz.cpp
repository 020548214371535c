// Any bytes as tokenizer.json of CLIP, or as vocab.json and merges.txt with a zero byte between:
// refused, or a tokenizer whose ids are all below its vocab_size().
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "common/core/error.h"
#include "common/tokenizers/clip_bpe.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using flux::tokenizers::ClipTokenizer;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const size_t zero = bytes.find('\0');
  try {
    const auto clip =
        zero == std::string_view::npos
            ? ClipTokenizer::parse_json(bytes, "input")
            : ClipTokenizer::parse(bytes.substr(0, zero), bytes.substr(zero + 1), "input");
    for (const int32_t id : clip.encode(
             "a photo\u2026 of <|endoftext|> the E\u0301 \uFF21\u200B \U0001F600 dog's 12")) {
      if (id < 0 || id >= clip.vocab_size()) std::abort();
    }
  } catch (const flux::InputError&) {
  }
  return 0;
}
