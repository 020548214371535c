#include "pipelines/stage/write_queue.h"

#include <fmt/format.h>

#include <span>
#include <utility>
#include <vector>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/text.h"
#include "common/core/threads.h"
#include "pipelines/stage/finish.h"

namespace flux::stage {

WriteQueue::WriteQueue(cache::Writer& writer,
                       const cache::Layout& layout,
                       StageTimes& times,
                       std::string noun,
                       int64_t max_bytes)
    : writer_(writer),
      layout_(layout),
      noun_(std::move(noun)),
      max_bytes_(max_bytes),
      compress_time_(times.add("compress")),
      write_time_(times.add("write")) {
  try {
    threads_ = start_threads(1, [this] { compress(); });
    threads_.push_back(std::move(start_threads(1, [this] { write(); }).front()));
  } catch (...) {  // the one that waits already must end before the queues go
    fail();
    throw;
  }
}

WriteQueue::~WriteQueue() {
  encoded_.close();  // the compressor ends, and then the writing thread
}

void WriteQueue::compress() {
  try {
    while (auto sample = encoded_.pop()) {
      const StageTime::Scope busy(compress_time_);
      const std::vector<std::span<const std::byte>> tensors(sample->tensors.begin(),
                                                            sample->tensors.end());
      if (!compressed_.push(cache::prepare(layout_, sample->info, tensors))) break;
    }
  } catch (...) {
    fail();
  }
  compressed_.close();
}

void WriteQueue::write() {
  try {
    while (auto record = compressed_.pop()) {
      write_one(std::move(*record));
      const std::lock_guard guard(lock_);
      ++arrived_;
      changed_.notify_all();
    }
  } catch (...) {
    fail();
  }
}

void WriteQueue::write_one(cache::Record record) {
  const StageTime::Scope busy(write_time_);
  int64_t bytes = 0;
  for (const auto& frame : record.frames) bytes += static_cast<int64_t>(frame.size());
  const int64_t needed = writer_.num_bytes() + bytes;
  if (max_bytes_ > 0 && needed > max_bytes_) {
    writer_.seal();
    throw ResourceError(
        fmt::format("--max-bytes {}: the next of the {} would bring the cache to about {}\n  "
                    "finished in this run: {}, all kept",
                    show_bytes(static_cast<uint64_t>(max_bytes_)),
                    noun_,
                    show_bytes(static_cast<uint64_t>(needed)),
                    num_written()),
        "allow more bytes and run the same command again: it goes on from here");
  }
  writer_.add(std::move(record));
}

void WriteQueue::fail() {
  const std::lock_guard guard(lock_);
  if (!failure_) failure_ = std::current_exception();
  encoded_.close();
  compressed_.close();
  changed_.notify_all();
}

void WriteQueue::rethrow() {
  const std::lock_guard guard(lock_);
  if (failure_) std::rethrow_exception(failure_);
}

void WriteQueue::add(EncodedSample sample) {
  if (encoded_.push(std::move(sample))) {
    const std::lock_guard guard(lock_);
    ++added_;
  }
  rethrow();
}

void WriteQueue::flush() {
  std::unique_lock guard(lock_);
  changed_.wait(guard, [this] { return failure_ || arrived_ == added_; });
  if (failure_) std::rethrow_exception(failure_);
}

void WriteQueue::stop_if_asked() {
  if (!cancel::requested()) return;
  flush();
  stage::stop_if_asked(writer_, noun_);
}

int64_t WriteQueue::num_written() const {
  const std::lock_guard guard(lock_);
  return arrived_;
}

}  // namespace flux::stage
