// Any bytes as spiece.model or tokenizer.json of T5: refused, or a tokenizer whose ids are all
// below its vocab_size().
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "common/core/error.h"
#include "common/tokenizers/t5_unigram.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using flux::tokenizers::T5Tokenizer;
  try {
    const auto t5 = T5Tokenizer::parse({reinterpret_cast<const char*>(data), size}, "input");
    for (const int32_t id :
         t5.encode("a photo\u2026 of <pad> the e\u0301 \uFF21\u200B \U0001F600 dog's")) {
      if (id < 0 || id >= t5.vocab_size()) std::abort();
    }
  } catch (const flux::InputError&) {
  }
  return 0;
}
