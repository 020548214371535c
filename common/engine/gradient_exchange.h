// common/engine/gradient_exchange.h - gradients of a step whose micro-batches run in several ranks.
//
// Micro-batch j of a step runs in rank j mod world. Where every rank trains all of a block, its gradients travel as one flat
// float32 tensor, while the block before it computes, and all ranks have the sums in the end. Where ranks share a block out
// (Share) each has the sums of its part; they travel in pieces, for such a block is large.
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
  /// `piece`: elements of what is shared out that are on their way at a time, to all ranks together.
  explicit GradientExchange(const Ranks& ranks, int64_t piece = int64_t{1} << 24)
      : ranks_(ranks), piece_(piece) {}

  /// A micro-batch's backward through the block (-1: through a part of what is outside) is over. Takes its gradients, if
  /// sums are to be exact. `share` as Blocks::share() has it.
  void collected(int64_t block, std::span<Trainable> trainables, const Share* share);
  /// All micro-batches are through: begins to sum the block's gradients, after those of the block before. With a share the
  /// sums are in what is owned at once.
  void start(int64_t block, std::span<Trainable> trainables, Share* share);
  /// The sums of all blocks that were started are in their trainables, which must be there still.
  void finish();

 private:
  /// The trainables that a gradient reached, their gradients one behind the other, with zeros up to a multiple of the
  /// ranks.
  struct Flat {
    std::vector<size_t> indices;
    at::Tensor values;  // float32
  };
  Flat take(std::span<Trainable> trainables) const;
  void put(const Flat& flat, std::span<Trainable> trainables) const;
  at::Tensor start_to_send(const at::Tensor& values) const;
  void gather(const at::Tensor& all, const at::Tensor& own) const;
  void add_shared(std::span<Trainable> trainables, const Share& share, at::Tensor& sum) const;
  at::Tensor in_order(const at::Tensor& received) const;
  at::Tensor over_replicas(const at::Tensor& piece) const;

  Ranks ranks_;
  int64_t piece_;
  /// Exact: by block and first trainable that was reached, this rank's part of the sum so far.
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
  };
  std::optional<Started> started_;
};

}  // namespace flux::engine
