// common/engine/gradient_exchange.h - gradients of a step whose micro-batches run in several ranks.
//
// Micro-batch j of a step runs in rank j mod world. A block's gradients travel as one flat float32 tensor, while the block
// before it computes. Where every rank trains all of a block, all have the sums in the end; where they share it out
// (Share), each has those of its part.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "common/dist/group.h"
#include "common/engine/block_loop.h"

namespace flux::engine {

/// Groups are null with a world of 1, and in plans.
struct Ranks {
  int64_t world = 1, rank = 0;
  dist::Group* group = nullptr;  // all ranks
  /// Sums every micro-batch's gradients in the order of the step, so that the bits are those of one rank that accumulates
  /// them; else each rank's own are summed first. Moves gradients once a micro-batch instead of once a step.
  bool exact = false;
  /// Of weights that are trained whole: neighbours, shard_world of them, share a copy out; 1: each rank has all.
  int64_t shard_world = 1;
  dist::Group* shard = nullptr;   // those of this rank's copy
  dist::Group* gather = nullptr;  // the same, for another thread
  dist::Group* replica =
      nullptr;  // those that have the same part of their copies, in order; null with one copy
  bool several() const { return world > 1; }
  bool sharded() const { return shard_world > 1; }
  int64_t shard_rank() const { return rank % shard_world; }
  int64_t num_replicas() const { return world / shard_world; }
};

/// Sums every rank's Trainable::gradient over all micro-batches of all ranks, to the same bits. Calls come in the same order
/// in every rank. Throws what dist::Group throws.
class GradientExchange {
 public:
  explicit GradientExchange(const Ranks& ranks) : ranks_(ranks) {}

  /// A micro-batch's backward through the block (-1: through a part of what is outside) is over. Takes its gradients, if
  /// sums are to be exact. `share` as Blocks::share() has it.
  void collected(int64_t block, std::span<Trainable> trainables, const Share* share);
  /// All micro-batches are through: begins to sum the block's gradients, after those of the block before.
  void start(int64_t block, std::span<Trainable> trainables, Share* share);
  /// The sums of all blocks that were started are in their trainables, or in what is owned of them; without a share the
  /// trainables must be there still.
  void finish();

 private:
  /// The trainables that a gradient reached, their gradients one behind the other, with zeros up to a multiple of the
  /// ranks; or with a share all, as they lie in its record.
  struct Flat {
    std::vector<size_t> indices;
    at::Tensor values;  // float32
  };
  Flat take(std::span<Trainable> trainables, const Share* share) const;
  void put(const Flat& flat, std::span<Trainable> trainables) const;
  static void put_owned(const at::Tensor& part, Share& share);
  at::Tensor send(const at::Tensor& values, const Share* share) const;
  at::Tensor in_order(const at::Tensor& received, const Share* share) const;
  at::Tensor over_replicas(const at::Tensor& part) const;
  void gather(const at::Tensor& all, const at::Tensor& own) const;

  Ranks ranks_;
  /// Exact: by block and first trainable, this rank's part of the sum so far.
  struct Part {
    Flat flat;  // its values are reused for what comes back
    at::Tensor sum;
  };
  std::map<std::pair<int64_t, size_t>, Part> parts_;
  /// On its way.
  struct Started {
    Flat flat;
    at::Tensor received;
    std::span<Trainable> trainables;
    Share* share = nullptr;
  };
  std::optional<Started> started_;
};

}  // namespace flux::engine
