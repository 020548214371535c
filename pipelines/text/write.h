// pipelines/text/write.h - encoded captions on their way into the cache, compressed while the next
// batch is encoded.
#pragma once
#include <cstddef>
#include <future>
#include <vector>

#include "formats/cache/writer.h"

namespace flux::text {

/// One caption with both embeddings, in the cache's dtype.
struct EncodedCaption {
  cache::SampleInfo info;
  std::vector<std::byte> t5;    // [L, X]
  std::vector<std::byte> clip;  // [V]
};

/// Hands batches to the writer. add() and flush() throw what the writer throws; a batch is in the
/// cache one add() later.
class CacheQueue {
 public:
  CacheQueue(cache::Writer& writer, const cache::Layout& layout)
      : writer_(writer), layout_(layout) {}
  ~CacheQueue();
  CacheQueue(const CacheQueue&) = delete;
  CacheQueue& operator=(const CacheQueue&) = delete;

  void add(std::vector<EncodedCaption> batch);
  void flush();

 private:
  cache::Writer& writer_;
  cache::Layout layout_;
  std::future<std::vector<cache::Record>> compressing_;
};

}  // namespace flux::text
