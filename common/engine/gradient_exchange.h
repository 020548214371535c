// common/engine/gradient_exchange.h - gradients of a step whose micro-batches run in several ranks.
//
// Micro-batch j of a step runs in rank j mod world. A block's gradients travel as one flat float32 tensor, while the block
// before it computes.
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

struct Ranks {
  dist::Group* group = nullptr;  // null with a world of 1, and in plans
  int64_t world = 1;
  /// Sums every micro-batch's gradients in the order of the step, so that the bits are those of one rank that accumulates
  /// them; else each rank's own are summed first. Moves gradients once a micro-batch instead of once a step.
  bool exact = false;
  bool several() const { return world > 1; }
};

/// Makes every rank's Trainable::gradient the sum over all micro-batches of all ranks, to the same bits. Calls come in
/// the same order in every rank. Throws what dist::Group throws.
class GradientExchange {
 public:
  explicit GradientExchange(const Ranks& ranks) : ranks_(ranks) {}

  /// A micro-batch's backward through the block (-1: through a part of what is outside) is over. Takes its gradients, if
  /// sums are to be exact.
  void collected(int64_t block, std::span<Trainable> trainables);
  /// All micro-batches are through: begins to sum the block's gradients, after those of the block before.
  void start(int64_t block, std::span<Trainable> trainables);
  /// The sums of all blocks that were started are in their trainables, which must be there still.
  void finish();

 private:
  /// The trainables that a gradient reached, their gradients one behind the other.
  struct Flat {
    std::vector<size_t> indices;
    at::Tensor values;  // float32, with zeros up to a multiple of the ranks
  };
  Flat take(std::span<Trainable> trainables) const;
  void put(const Flat& flat, std::span<Trainable> trainables) const;
  at::Tensor sum_of_parts(at::Tensor sum, const at::Tensor& received) const;
  at::Tensor exchange(const at::Tensor& values) const;
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
  };
  std::optional<Started> started_;
};

}  // namespace flux::engine
