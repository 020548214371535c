// pipelines/stage/write_queue.h - the last two stages of both encoders: compress, write.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "formats/cache/writer.h"
#include "pipelines/stage/bounded_queue.h"
#include "pipelines/stage/sink.h"
#include "pipelines/stage/times.h"

namespace flux::stage {

/// Compresses samples in one thread and adds them to the cache in another, while the next ones are
/// encoded. At most four samples wait before each. The writer must not be used by others between
/// add() and flush().
class WriteQueue : public Sink {
 public:
  /// `noun` of the samples ("images"); `max_bytes` of the folder's cache files, 0 = no limit.
  /// Throws ResourceError if its threads cannot be started.
  WriteQueue(cache::Writer& writer,
             const cache::Layout& layout,
             StageTimes& times,
             std::string noun,
             int64_t max_bytes);
  /// Finishes what was added; what that throws is lost, so call flush() first.
  ~WriteQueue() override;
  WriteQueue(const WriteQueue&) = delete;
  WriteQueue& operator=(const WriteQueue&) = delete;

  /// Throws ResourceError: a write failed, or the folder has reached `max_bytes`; what is finished
  /// is sealed then.
  void add(EncodedSample sample) override;
  void flush() override;
  void stop_if_asked() override;
  /// Samples that are in the cache.
  int64_t num_written() const;

 private:
  void compress();
  void write();
  void write_one(cache::Record record);
  void fail();
  void rethrow();

  cache::Writer& writer_;
  const cache::Layout layout_;
  const std::string noun_;
  const int64_t max_bytes_;
  StageTime &compress_time_, &write_time_;
  BoundedQueue<EncodedSample> encoded_{4};
  BoundedQueue<cache::Record> compressed_{4};
  mutable std::mutex lock_;  // of what follows
  std::condition_variable changed_;
  int64_t added_ = 0, arrived_ = 0;
  std::exception_ptr failure_;
  std::vector<std::jthread> threads_;  // last: they end before the rest goes
};

}  // namespace flux::stage
