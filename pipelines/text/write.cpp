#include "pipelines/text/write.h"

#include <array>
#include <span>
#include <utility>

namespace flux::text {

CacheQueue::~CacheQueue() {
  if (compressing_.valid()) compressing_.wait();
}

void CacheQueue::add(std::vector<EncodedCaption> batch) {
  flush();
  compressing_ = std::async(std::launch::async, [layout = layout_, captions = std::move(batch)] {
    std::vector<cache::Record> records;
    for (const EncodedCaption& caption : captions) {
      const std::array<std::span<const std::byte>, 2> tensors{caption.t5, caption.clip};
      records.push_back(cache::prepare(layout, caption.info, tensors));
    }
    return records;
  });
}

void CacheQueue::flush() {
  if (!compressing_.valid()) return;
  for (cache::Record& record : compressing_.get()) writer_.add(std::move(record));
}

}  // namespace flux::text
