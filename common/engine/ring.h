// common/engine/ring.h - records pass through a bounded piece of memory in an order known ahead.
//
//   Ring ring(store, device, forward_and_back(records), {.lookahead = 1});
//   for (each position) {
//     auto lease = ring.acquire();     // waits until the record is there
//     ... layout.view(lease.record, i) ...
//     ring.release(std::move(lease), /*dirty=*/false);
//   }
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "common/engine/record_store.h"
#include "common/engine/ring_plan.h"

namespace flux::engine {

struct RingOptions {
  /// Records in memory beside the one that was acquired last: 1 to 3 (2 to 4 slots).
  int64_t lookahead = 1;
  /// 0: the smallest for the lookahead, see plan_ring(). A larger arena saves loads.
  int64_t capacity_bytes = 0;
  /// Threads that read. Two get 2.0 GB/s out of a disk that gives one 1.7 (docs/benchmarks.md).
  int read_threads = 2;
  RingSlots slots = RingSlots::kFitting;
  /// Whether the cycle begins again after its end. If not, nothing is read beyond it, and set_schedule() lets all reads
  /// that it planned come to their end.
  bool repeats = true;
  /// acquire() and flush() throw Interrupted while they wait, once a signal has come: for work
  /// that has nothing to save.
  bool interruptible = false;
};

/// A record in memory.
struct Lease {
  at::Tensor record;      // uint8 [record_bytes], on the ring's device
  int64_t index = -1;     // of the record
  int64_t position = -1;  // since the schedule began
};

/// What a record that is acquired holds.
enum class RingContents {
  kRead,  // what the store has
  kNone,  // anything: the whole record will be written, so nothing is read
};

/// What a ring did since it was made.
struct RingCounts {
  int64_t loads = 0, bytes_read = 0;
  int64_t write_backs = 0, bytes_written = 0;
  double waited_seconds = 0;  // of acquire() and flush()
  RingCounts& operator+=(const RingCounts& other);
};

/// One thread acquires and releases; others read and write. On Meta there is the arena and no
/// thread, and nothing is read or written.
class Ring {
 public:
  /// Makes the arena (counted under MemoryCause::kRing) and begins to read. Throws
  /// std::invalid_argument as plan_ring() does, OutOfMemory, ResourceError if no thread starts.
  ///   cycle  record numbers, repeated for ever; a record may be in it several times
  Ring(std::shared_ptr<RecordStore> store,
       at::Device device,
       std::vector<int64_t> cycle,
       const RingOptions& options = {},
       RingContents contents = RingContents::kRead);
  /// Waits for reads and writes in progress only; dirty records that were not flushed are lost.
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  /// The record of the next position. Up to lookahead + 1 may be held at a time; holding so many
  /// that the next has no room is std::logic_error. On CUDA, work queued on the current stream
  /// afterwards finds it complete. Throws what a thread's read or write threw; the ring stays in
  /// that state.
  Lease acquire();
  /// `dirty`: the record was changed: it is written back before its memory is used for another. On
  /// CUDA, work queued on the current stream so far may still read it.
  void release(Lease lease, bool dirty);
  /// Returns when the store has all dirty records. Throws std::logic_error while a lease is held;
  /// what a write threw.
  void flush();
  /// Starts anew at position 0 of another cycle, in the same arena, with a lookahead as large as it allows. Flushes first,
  /// and forgets what is there. Throws as flush() and plan_ring() do.
  void set_schedule(std::vector<int64_t> cycle, RingContents contents = RingContents::kRead);

  int64_t capacity_bytes() const;
  const RingPlan& plan() const;
  RingCounts counts() const;
  /// Host memory that its threads hold for staging, at most; for plans.
  static int64_t staging_bytes(const RecordStore& store,
                               at::Device device,
                               const RingOptions& options);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flux::engine
