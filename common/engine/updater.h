// common/engine/updater.h - when and how gradients become updates while blocks come and go.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/engine/block_loop.h"
#include "common/engine/choices.h"
#include "common/engine/gradient_exchange.h"
#include "common/optim/optimizer.h"

namespace flux::engine {

struct UpdateOptions {
  ClipMode clip = ClipMode::kGlobal;
  double max_norm = 1;                   // > 0; not read with kNone
  uint64_t seed = 0;                     // of stochastic rounding
  bool want_norm = true;                 // with kNone: whether the norm is computed, for the log
  GradientExchange* exchange = nullptr;  // of several ranks; must outlive this
  int64_t shard_world = 1;               // as Ranks has them: for norms of what is shared out
  dist::Group* shard = nullptr;
  /// Called with what was just updated, before averages take it in: only for what stays with its states while its block
  /// is there.
  std::function<void(std::span<Trainable> trainables)> after_update{};
};

/// "the loss", "the gradient of X": is infinite or NaN.
struct NotFinite : std::runtime_error {
  explicit NotFinite(const std::string& what) : std::runtime_error(what + " is not finite") {}
  double loss = 0;  // of the step
};

/// Applies an optimizer to the blocks of a loop:
///
///   updater.begin(lr);
///   loop.step(batches, updater.hooks());
///   updater.finish();
///
/// An optimizer that must see all gradients first (Optimizer::two_phase) sees them in finish() and updates there, visiting
/// blocks that have left twice.
///
/// With kGlobal a block in memory is updated in finish(), and one that has left at its next forward: its gradient stays
/// with it until then. Where ranks share a block out its forward needs what all of them updated, so that finish() updates
/// it in any case. Otherwise a block is updated in the backward, as soon as its gradients are there, and they go.
class Updater {
 public:
  Updater(Blocks& blocks, Optimizer& optimizer, UpdateOptions options);

  /// Starts an update with this learning rate. Throws nothing.
  void begin(int64_t step, double learning_rate);
  LoopHooks hooks();
  /// Ends it. The norm of all gradients before clipping, nothing if it was not wanted. Throws NotFinite, before
  /// anything is updated with kGlobal, if a gradient is not finite.
  std::optional<double> finish();

  /// After a step that failed before finish() returned: its gradients count for nothing. What still waited since the step
  /// before is lost, so that is_whole() stays false.
  void abandon();
  /// Whether all blocks are at the end of the same step; updates that wait count as made.
  bool is_whole() const { return whole_; }
  /// Makes the updates that wait, without a forward: before weights are saved.
  void flush();

 private:
  double clip_scale(double norm) const;
  double global_norm() const;
  void add_norms(int64_t block);
  void take_squares(int64_t block);
  void add_shared_norms();
  Share* share_of(int64_t block) const { return block < 0 ? nullptr : blocks_.share(block); }
  bool update(int64_t block, StepScalars scalars);
  void update_in_two_phases();
  /// Whether gradients stay until finish().
  bool gradients_wait() const {
    return options_.clip == ClipMode::kGlobal || optimizer_.two_phase();
  }
  bool wants_norms() const { return options_.clip != ClipMode::kNone || options_.want_norm; }
  /// Whether the block's gradients are summed over the ranks while later ones compute.
  bool sums_later(int64_t block) const {
    return options_.exchange && gradients_wait() && stays(block) && !share_of(block);
  }
  bool stays(int64_t block) const { return block < 0 || blocks_.trainables_stay(block); }
  /// With its learning rate and clipping.
  StepScalars scalars_of(const Trainable& trainable, StepScalars scalars) const;
  bool before_forward(int64_t block);
  bool ready(int64_t block, std::span<Trainable> trainables);

  Blocks& blocks_;
  Optimizer& optimizer_;
  UpdateOptions options_;
  StepScalars scalars_;           // of the step at work, or the last one
  StepScalars pending_scalars_;   // of the blocks in pending_
  std::vector<int64_t> waiting_;  // blocks that left with this step's gradients
  std::vector<int64_t> pending_;  // the same of the step before, until their next forward
  bool whole_ = true;
  std::map<uint64_t, double> norms_;  // by parameter, so that their sum has one order
  /// By block, of what this rank has of it: its parts' sums of squares, until they are in norms_.
  std::map<int64_t, std::vector<double>> squares_;
};

}  // namespace flux::engine
