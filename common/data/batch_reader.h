// common/data/batch_reader.h - batches in order, read ahead by threads.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "common/data/training_data.h"

namespace flux {

/// The next batch to be read. Enough to resume: what comes after does not depend on what came
/// before.
struct DataPosition {
  int64_t epoch = 0, batch = 0;
  bool operator==(const DataPosition&) const = default;
};

struct ReaderOptions {
  int64_t num_threads = 2;
  int64_t num_ahead = 4;     // batches held ready at most
  int64_t num_batches = -1;  // to read in all; -1: without end
  /// Of several readers that take turns: reads every stride'th batch, beginning with number `turn` behind the position.
  int64_t turn = 0, stride = 1;
};

/// Reads from a position on, across epoch ends. The result does not depend on num_threads and
/// num_ahead.
class BatchReader {
 public:
  /// `data` must outlive the reader. Throws std::invalid_argument if the position is not in the
  /// data.
  BatchReader(const TrainingData& data, DataPosition start, const ReaderOptions& options);
  /// Waits for batches that are being read.
  ~BatchReader();
  BatchReader(const BatchReader&) = delete;
  BatchReader& operator=(const BatchReader&) = delete;

  /// The next batch; throws what reading it threw. std::out_of_range after num_batches.
  Batch next();
  /// Of the batch that next() will return; of several readers, of the first of theirs when each has taken as many turns.
  DataPosition position() const;
  /// What the `count` batches from position() on hold, those of all readers.
  std::vector<BatchOutline> outline(int64_t count) const;
  /// Time spent in next() so far.
  double wait_seconds() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace flux
