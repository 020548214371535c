// common/engine/block_loop.h - loss and gradients of a step, a block of the transformer at a time.
//
// The forward keeps nothing but the inputs of the blocks. The backward visits the blocks in reverse, runs each once more
// with its graph, takes the gradient of its input, and lets the graph go before the next. All micro-batches of a step pass
// through a block while it is there. The gradients are, to the bit, those of plain autograd over dit::forward() with
// gradients of several micro-batches summed in float32 (a test proves it), on the CPU, on CUDA and on Meta alike.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "common/engine/block_inputs.h"
#include "common/models/flux/transformer.h"

namespace flux::engine {

/// A tensor that is trained.
struct Trainable {
  std::string name;  // BFL name, or that of an adapter: "double_blocks.0.img_attn.qkv.down"
  at::Tensor value;  // a leaf that requires grad
  std::vector<at::Tensor> states{};  // of its optimizer
  uint64_t id = 0;                   // its stream of random numbers
  /// Summed over the micro-batches of a step: in the dtype of `value` if there was one, else float32. Undefined if
  /// none reached it.
  at::Tensor gradient{};
  double lr_factor = 1;  // of the step's learning rate
  /// Of ranks that share weights out: this is a part of a tensor of the shape `whole`: elements [offset, offset +
  /// value.numel()) of it, flattened, as one dimension; so are the states. Empty: all of it.
  int64_t offset = 0;
  std::vector<int64_t> whole{};
};

/// How the weights of a block are shared out among ranks (share_layout.h): they are elements of one flat record, of which
/// each rank has an equal part.
struct Share {
  int64_t elements = 0;  // of a rank's part
  struct Range {
    int64_t begin = 0, count = 0;
  };
  std::vector<Range> tensors{};             // by trainable, in the record
  std::vector<Trainable> owned{};           // what this rank's part holds of them, in their order
  std::vector<int64_t> begins{}, counts{};  // by what is owned, in the part
};

/// The blocks of a model in forward order, double blocks first, wherever their weights are.
class Blocks {
 public:
  virtual ~Blocks() = default;
  /// The model. Tensors of a block are there between enter() and leave(), all others always.
  virtual const dit::Weights& weights() const = 0;
  /// Waits until the block is there. The loop enters 0, 1, ..., n - 1, n - 1, ..., 1, 0 and again; a block whose
  /// graph is kept is not left in between and not entered twice.
  virtual void enter(int64_t block) = 0;
  /// `changed`: its trainables were updated.
  virtual void leave(int64_t block, bool changed) = 0;
  /// What is trained of a block that is there.
  virtual std::span<Trainable> trainables(int64_t block) = 0;
  /// What is trained outside of blocks.
  virtual std::span<Trainable> outer_trainables() = 0;
  /// Of ranks that share a block's weights out; null: each has and trains all of it. With a share, gradients are collected
  /// in trainables() and what is updated is Share::owned.
  virtual Share* share(int64_t /*block*/) { return nullptr; }
  /// What this rank updates of a block (-1: of what is outside of blocks).
  std::span<Trainable> owned(int64_t block);
  /// States, and the gradient that waits, of owned() number i of a block that is there; if they stream they are there between
  /// open() and close() only. One is open at a time. Block -1: what is outside of blocks.
  virtual void open(int64_t /*block*/, size_t /*i*/) {}
  /// `changed`: it was updated.
  virtual void close(int64_t /*block*/, size_t /*i*/, bool /*changed*/) {}
  /// Opens each that is owned() of a block, calls `work`, and closes it, changed if that returned true. Returns whether any
  /// was.
  bool for_each_trainable(int64_t block, const std::function<bool(Trainable&)>& work);
  /// Whether what is owned() of the block is there at all times.
  virtual bool trainables_stay(int64_t block) const = 0;
  /// Outside of steps: calls `work` for each of `blocks` while what is owned() of it is there; it returns whether it
  /// changed it.
  virtual void visit(std::span<const int64_t> blocks,
                     const std::function<bool(int64_t block)>& work) = 0;
  /// Outside of steps: enters every block in forward order with all its tensors, calls `work`, and leaves it, changed if
  /// that returned true.
  virtual void pass(const std::function<bool(int64_t block)>& work) = 0;
};

/// One forward and backward.
struct MicroBatch {
  dit::Inputs inputs;
  /// From the velocity [B, N, out_channels] to its part of the step's loss: scalar float32 with its graph.
  std::function<at::Tensor(const at::Tensor& velocity)> loss;
};

struct LoopOptions {
  /// The first block with something to train; -1: what is outside of blocks is trained too. The backward ends there.
  int64_t first_trained = -1;
  /// Blocks that are not run again: their graphs are kept from the forward to the backward. Empty: none.
  std::vector<char> keep_graph{};
  InputPlace inputs = InputPlace::kDevice;
  std::filesystem::path scratch{};  // folder, for InputPlace::kDisk
};

/// What a step calls on its way. All but `ready` may be empty.
struct LoopHooks {
  /// Layers are about to compute for this micro-batch, for the first time or again.
  std::function<void(size_t micro_batch)> before_run{};
  /// What the forward came to: before the first block (-1) img, txt and vec, after each block its outputs, and after all
  /// of them (their number) the velocity. For looking only.
  std::function<void(int64_t block, size_t micro_batch, std::span<const at::Tensor> values)>
      after_run{};
  /// A block was entered for the forward: a deferred update is made here. Returns whether it was.
  std::function<bool(int64_t block)> before_forward{};
  /// The losses are known, nothing is updated yet: a loss that is not finite is refused here.
  std::function<void(std::span<const at::Tensor> losses)> after_forward{};
  /// A micro-batch's gradients of a block, or of a part of what is outside (-1), were added.
  std::function<void(int64_t block, std::span<Trainable> trainables)> collected{};
  /// All gradients of a block (-1: of what is outside of blocks) are there. Returns whether it updated anything. What
  /// it leaves in Trainable::gradient stays.
  std::function<bool(int64_t block, std::span<Trainable> trainables)> ready;
};

/// What a forward without gradients calls on its way.
struct ForwardHooks {
  /// A block was entered; it is about to be left.
  std::function<void(int64_t block)> entered{}, leaving{};
};

class BlockLoop {
 public:
  BlockLoop(const dit::Config& config, Blocks& blocks, LoopOptions options);
  ~BlockLoop();

  /// One step. Returns each micro-batch's loss, detached, on the device.
  std::vector<at::Tensor> step(std::span<const MicroBatch> micro_batches, const LoopHooks& hooks);

  /// One forward without gradients, outside of steps: all batches pass through a block while it is there. Returns what
  /// each one's `loss` makes of the velocity, which has no graph: to the bit that of a step's forward.
  std::vector<at::Tensor> forward_only(std::span<const MicroBatch> batches,
                                       const ForwardHooks& hooks = {});

 private:
  struct Micro;
  void begin(std::span<const MicroBatch> batches,
             const std::function<void(size_t micro_batch)>& before_run,
             bool with_graph);
  at::Tensor velocity_of(const Micro& micro, const at::Tensor& x, const at::Tensor& vec) const;
  std::vector<at::Tensor> whole_step(std::span<const MicroBatch> micro_batches,
                                     const LoopHooks& hooks);
  void leave_changed();
  void forward(std::span<const MicroBatch> batches, const LoopHooks& hooks);
  std::vector<at::Tensor> losses(std::span<const MicroBatch> batches, const LoopHooks& hooks);
  void backward(const LoopHooks& hooks);
  int64_t num_blocks() const { return config_.num_double_blocks + config_.num_single_blocks; }
  bool keeps_graph(int64_t block) const;
  bool trains_outer() const { return options_.first_trained < 0; }
  std::vector<at::Tensor> run_block(int64_t block,
                                    const Micro& micro,
                                    const std::vector<at::Tensor>& in,
                                    const at::Tensor& vec) const;
  std::vector<at::Tensor> with_graph(int64_t block, Micro& micro, std::vector<at::Tensor> in) const;

  dit::Config config_;
  Blocks& blocks_;
  LoopOptions options_;
  BlockInputs inputs_;
  std::vector<Micro> micros_;
  std::vector<int64_t>
      changed_;  // blocks that were updated before their forward and not left since
};

}  // namespace flux::engine
