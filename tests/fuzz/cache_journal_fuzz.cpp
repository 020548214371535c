// Any bytes as a journal: a prefix of whole samples, every one of which a segment can hold.
#include <cstdint>
#include <cstdlib>
#include <span>

#include "common/core/error.h"
#include "formats/cache/journal.h"
#include "formats/cache/segment_writer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux::cache;
  try {
    const JournalContent content = parse_journal(std::as_bytes(std::span(data, size)), "input");
    if (content.valid_bytes > size) std::abort();
    const size_t count = std::min<size_t>(content.records.size(), kMaxSegmentSamples);
    if (count > 0) encode_segment(content.header, std::span(content.records).first(count));
  } catch (const flux::CacheError&) {
  }
  return 0;
}
