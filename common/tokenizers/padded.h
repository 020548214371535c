// common/tokenizers/padded.h - token ids brought to the fixed length that an encoder reads.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace flux::tokenizers {

/// Token ids of one caption at a fixed length.
struct Padded {
  std::vector<int32_t> ids;  // exactly `length`
  int64_t
      num_live_tokens;  // the attention mask's ones: ids before padding, the final eos among them
  int64_t num_lost_tokens;  // ids cut off by truncation; 0 = the caption fits
};

/// `ids` (complete, with a final eos) at `length` >= 2: a longer list keeps its first length - 1
/// ids and gets `eos_id`, a shorter one is filled with `pad_id`. Source: huggingface/transformers,
/// tokenization_utils_base.py and 5.2, the rule of the fast tokenizers.
Padded pad_or_truncate(std::span<const int32_t> ids,
                       int64_t length,
                       int32_t eos_id,
                       int32_t pad_id);

}  // namespace flux::tokenizers
