// Any bytes as a caption: refused if they are not UTF-8, else ids of the tiny vocabularies that
// start and end as they must.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/tokenizers/clip_bpe.h"
#include "common/tokenizers/t5_unigram.h"
#include "common/tokenizers/tiny.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux::tokenizers;
  static const auto t5 = T5Tokenizer::parse(tiny_t5_model(), "tiny");
  static const auto clip = ClipTokenizer::parse(tiny_clip_vocab(), tiny_clip_merges(), "tiny");
  const std::string_view caption(reinterpret_cast<const char*>(data), size);
  const bool valid = !flux::first_invalid_utf8(caption);
  try {
    const auto t5_ids = t5.encode(caption), clip_ids = clip.encode(caption);
    if (!valid || t5_ids.back() != t5.eos_id() || clip_ids.front() != clip.bos_id() ||
        clip_ids.back() != clip.eos_id())
      std::abort();
    for (const int32_t id : t5_ids) {
      if (id < 0 || id >= t5.vocab_size()) std::abort();
    }
    for (const int32_t id : clip_ids) {
      if (id < 0 || id >= clip.vocab_size()) std::abort();
    }
  } catch (const flux::InputError&) {
    if (valid) std::abort();
  }
  return 0;
}
