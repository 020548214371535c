// common/engine/ring_plan.h - where in a ring's memory each record goes, worked out beforehand.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace flux::engine {

/// What happens for one position of an endless schedule.
struct Placement {
  int64_t record = 0;
  int64_t offset = 0;  // in the arena
  bool load = false;   // false: it is still there from an earlier position
  /// Whether the record's next position finds it still there.
  bool kept = false;
};

enum class RingSlots { kFitting, kEqual };

/// Positions 0, 1, 2, ... of a cycle that repeats for ever. The first positions start with an empty
/// arena; after the last one it goes on at `loop`.
struct RingPlan {
  int64_t capacity = 0;  // bytes
  std::vector<Placement> placements;
  size_t loop = 0;

  const Placement& at(int64_t position) const;
  /// Bytes loaded in one turn of the cycle, once the first is over.
  int64_t bytes_per_cycle(std::span<const int64_t> record_bytes, size_t cycle_length) const;
};

/// Places the records of `cycle` so that, while position p is loaded, those of the `lookahead`
/// positions before it are untouched; memory that this leaves over keeps records that come again
/// soonest. Deterministic.
///
///   record_bytes  by record number; each is placed at, and takes, a multiple of kRecordAlignment
///   cycle         record numbers; not empty
///   lookahead     at least 1: how many positions may be in memory beside the newest
///   capacity      of an arena that is there; 0: the smallest for which places are found. Tens of
///                 records of different sizes in a large arena take up to 0.7 s to place
///   slots         kFitting as said; kEqual: places are multiples of the largest record of the cycle, found at
///                 once however many there are; a cycle of records that all differ takes them in turn
///
/// Capacity is never below the largest sum of the different records in lookahead + 1 neighbouring
/// positions, and never above lookahead + 1 times the largest record. Throws std::invalid_argument
/// for empty or wrong numbers, or a capacity that is too small.
RingPlan plan_ring(std::span<const int64_t> record_bytes,
                   std::span<const int64_t> cycle,
                   int64_t lookahead,
                   int64_t capacity = 0,
                   RingSlots slots = RingSlots::kFitting);

/// 0, 1, ..., n-1, n-1, ..., 0 over `records`: how a step visits them.
std::vector<int64_t> forward_and_back(std::span<const int64_t> records);

}  // namespace flux::engine
