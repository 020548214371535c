#include "common/engine/block_loop.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <torch/csrc/autograd/autograd.h>

#include <map>
#include <optional>
#include <utility>

#include "common/tensor/memory.h"

namespace flux::engine {
namespace {

/// Streams or x, as a list: what goes into a block and comes out of it.
using Values = std::vector<at::Tensor>;

at::Tensor leaf(const at::Tensor& value, bool wanted) {
  return value.detach().requires_grad_(wanted);
}

/// Leaves the gradients in the leaves' grad. Outputs without a gradient are skipped.
void backward_from(const Values& outputs, const Values& gradients) {
  Values reached, given;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!gradients[i].defined() || !outputs[i].requires_grad()) continue;
    reached.push_back(outputs[i]);
    given.push_back(gradients[i]);
  }
  if (!reached.empty()) torch::autograd::backward(reached, given);
}

void add(at::Tensor& sum, const at::Tensor& value) {
  if (!value.defined()) return;
  sum = sum.defined() ? sum + value : value;
}

/// Moves the gradients that a backward left in the leaves into the trainables.
void collect(std::span<Trainable> trainables, bool several) {
  const MemoryScope scope(MemoryCause::kGradients);
  for (Trainable& trainable : trainables) {
    at::Tensor gradient = std::exchange(trainable.value.mutable_grad(), at::Tensor());
    if (!gradient.defined()) continue;
    if (several) gradient = gradient.to(at::kFloat);
    if (trainable.gradient.defined())
      trainable.gradient.add_(gradient);
    else
      trainable.gradient = std::move(gradient);
    count_as(trainable.gradient, MemoryCause::kGradients);
  }
}

}  // namespace

std::span<Trainable> Blocks::owned(int64_t block) {
  if (block < 0) return outer_trainables();
  if (Share* shared = share(block)) return shared->owned;
  return trainables(block);
}

bool Blocks::for_each_trainable(int64_t block, const std::function<bool(Trainable&)>& work) {
  bool any = false;
  const auto mine = owned(block);
  for (size_t i = 0; i < mine.size(); ++i) {
    open(block, i);
    const bool changed = work(mine[i]);
    close(block, i, changed);
    any = any || changed;
  }
  return any;
}

struct BlockLoop::Micro {
  int64_t text_length = 0, image_length = 0;
  dit::Rope rope;
  std::optional<at::Tensor> mask;
  at::Tensor vec;    // [B, H] float32, with its graph if it is trained
  Values embedded;   // img, txt with their graph if they are trained, else empty
  Values values;     // at the block that comes next
  Values gradients;  // of `values`, in the backward
  at::Tensor grad_vec;

  /// A block's inputs, vec and outputs with the graph between.
  struct Graph {
    Values inputs;
    at::Tensor vec;
    Values outputs;
  };
  std::map<int64_t, Graph> graphs;
};

BlockLoop::BlockLoop(const dit::Config& config, Blocks& blocks, LoopOptions options)
    : config_(config),
      blocks_(blocks),
      options_(std::move(options)),
      inputs_(options_.inputs, options_.scratch) {}

BlockLoop::~BlockLoop() = default;

bool BlockLoop::keeps_graph(int64_t block) const {
  return block >= options_.first_trained &&
         static_cast<size_t>(block) < options_.keep_graph.size() &&
         options_.keep_graph[static_cast<size_t>(block)];
}

/// From a block's inputs to its outputs; text and image are put together after the last double block.
Values BlockLoop::run_block(int64_t block,
                            const Micro& micro,
                            const Values& in,
                            const at::Tensor& vec) const {
  const dit::Weights& weights = blocks_.weights();
  const int64_t num_double = config_.num_double_blocks;
  if (block < num_double) {
    auto out = dit::double_block(weights.double_blocks[static_cast<size_t>(block)],
                                 {in[0], in[1]},
                                 vec,
                                 micro.rope,
                                 micro.mask);
    if (block + 1 < num_double) return {out.img, out.txt};
    return {at::cat({out.txt, out.img}, 1)};
  }
  return {dit::single_block(weights.single_blocks[static_cast<size_t>(block - num_double)],
                            in[0],
                            vec,
                            micro.rope,
                            micro.mask)};
}

Values BlockLoop::with_graph(int64_t block, Micro& micro, Values in) const {
  auto& graph = micro.graphs[block];
  const bool wanted = block > options_.first_trained;
  for (const auto& value : in) graph.inputs.push_back(leaf(value, wanted));
  graph.vec = leaf(micro.vec, trains_outer());
  const at::AutoGradMode grad(true);
  graph.outputs = run_block(block, micro, graph.inputs, graph.vec);
  Values out;
  for (const auto& value : graph.outputs) out.push_back(value.detach());
  return out;
}

/// What comes before the first block.
void BlockLoop::begin(std::span<const MicroBatch> batches,
                      const std::function<void(size_t micro_batch)>& before_run,
                      bool with_graph) {
  const dit::Weights& weights = blocks_.weights();
  micros_.clear();
  inputs_.clear();
  changed_.clear();
  micros_.resize(batches.size());
  for (size_t m = 0; m < batches.size(); ++m) {
    const dit::Inputs& inputs = batches[m].inputs;
    Micro& micro = micros_[m];
    const at::AutoGradMode grad(with_graph);
    if (before_run) before_run(m);
    dit::check(config_, inputs);
    micro.text_length = inputs.txt.size(1);
    micro.image_length = inputs.img.size(1);
    micro.rope = dit::rope_table(config_, at::cat({inputs.txt_ids, inputs.img_ids}, -2));
    micro.mask = dit::key_mask(inputs);
    micro.vec = dit::condition(config_, weights, inputs);
    auto streams = dit::input_streams(weights, inputs);
    if (with_graph) micro.embedded = {streams.img, streams.txt};
    micro.values = {streams.img.detach(), streams.txt.detach()};
  }
}

void BlockLoop::forward(std::span<const MicroBatch> batches, const LoopHooks& hooks) {
  begin(batches, hooks.before_run, trains_outer());
  const at::NoGradGuard no_grad;
  for (size_t m = 0; hooks.after_run && m < micros_.size(); ++m) {
    const Micro& micro = micros_[m];
    hooks.after_run(-1, m, Values{micro.values[0], micro.values[1], micro.vec});
  }
  for (int64_t block = 0; block < num_blocks(); ++block) {
    blocks_.enter(block);
    if (hooks.before_forward && hooks.before_forward(block)) changed_.push_back(block);
    for (size_t m = 0; m < micros_.size(); ++m) {
      Micro& micro = micros_[m];
      Values in = std::exchange(micro.values, {});
      const MemoryScope scope(MemoryCause::kWorkingSet);
      if (hooks.before_run) hooks.before_run(m);
      if (keeps_graph(block)) {
        micro.values = with_graph(block, micro, std::move(in));
      } else {
        micro.values = run_block(block, micro, in, micro.vec);
        if (block >= options_.first_trained) inputs_.keep(block, m, std::move(in));
      }
      if (hooks.after_run) hooks.after_run(block, m, micro.values);
    }
    if (!keeps_graph(block)) blocks_.leave(block, std::erase(changed_, block) > 0);
  }
}

at::Tensor BlockLoop::velocity_of(const Micro& micro,
                                  const at::Tensor& x,
                                  const at::Tensor& vec) const {
  return dit::final_layer(
      blocks_.weights(), x.narrow(1, micro.text_length, micro.image_length), vec);
}

std::vector<at::Tensor> BlockLoop::losses(std::span<const MicroBatch> batches,
                                          const LoopHooks& hooks) {
  std::vector<at::Tensor> losses;
  const at::AutoGradMode grad(true);
  for (size_t m = 0; m < micros_.size(); ++m) {
    Micro& micro = micros_[m];
    const at::Tensor x = leaf(std::exchange(micro.values, {})[0], true);
    const at::Tensor vec = leaf(micro.vec, trains_outer());
    const at::Tensor velocity = velocity_of(micro, x, vec);
    if (hooks.after_run) hooks.after_run(num_blocks(), m, Values{velocity.detach()});
    const at::Tensor loss = batches[m].loss(velocity);
    torch::autograd::backward({loss}, {});
    losses.push_back(loss.detach());
    micro.gradients = {std::exchange(x.mutable_grad(), at::Tensor())};
    micro.grad_vec = std::exchange(vec.mutable_grad(), at::Tensor());
    collect(blocks_.outer_trainables(), micros_.size() > 1);
    if (hooks.collected) hooks.collected(-1, blocks_.outer_trainables());
  }
  return losses;
}

void BlockLoop::backward(const LoopHooks& hooks) {
  for (int64_t block = num_blocks() - 1; block >= std::max<int64_t>(options_.first_trained, 0);
       --block) {
    if (!keeps_graph(block)) blocks_.enter(block);
    const auto trainables = blocks_.trainables(block);
    for (size_t m = 0; m < micros_.size(); ++m) {
      Micro& micro = micros_[m];
      const MemoryScope scope(MemoryCause::kWorkingSet);
      if (hooks.before_run) hooks.before_run(m);
      if (!keeps_graph(block)) with_graph(block, micro, inputs_.take(block, m));
      auto graph = std::move(micro.graphs.extract(block).mapped());
      backward_from(graph.outputs, micro.gradients);
      micro.gradients.clear();
      for (const auto& input : graph.inputs) micro.gradients.push_back(input.grad());
      if (trains_outer()) add(micro.grad_vec, graph.vec.grad());
      collect(trainables, micros_.size() > 1);
      if (hooks.collected) hooks.collected(block, trainables);
    }
    const bool updated = hooks.ready(block, trainables);
    blocks_.leave(block, std::erase(changed_, block) > 0 || updated);
  }
  if (!trains_outer()) return;
  for (Micro& micro : micros_) {
    backward_from({micro.embedded[0], micro.embedded[1], micro.vec},
                  {micro.gradients[0], micro.gradients[1], micro.grad_vec});
    collect(blocks_.outer_trainables(), micros_.size() > 1);
    if (hooks.collected) hooks.collected(-1, blocks_.outer_trainables());
  }
  hooks.ready(-1, blocks_.outer_trainables());
}

std::vector<at::Tensor> BlockLoop::step(std::span<const MicroBatch> micro_batches,
                                        const LoopHooks& hooks) {
  try {
    return whole_step(micro_batches, hooks);
  } catch (...) {
    leave_changed();
    throw;
  }
}

/// After a step that failed: blocks in hand have the update of the step before, and no gradients that count.
void BlockLoop::leave_changed() {
  for (const int64_t block : std::exchange(changed_, {})) {
    for (Trainable& trainable : blocks_.trainables(block)) trainable.gradient.reset();
    for (Trainable& trainable : blocks_.owned(block)) trainable.gradient.reset();
    blocks_.leave(block, true);
  }
}

std::vector<at::Tensor> BlockLoop::whole_step(std::span<const MicroBatch> micro_batches,
                                              const LoopHooks& hooks) {
  forward(micro_batches, hooks);
  auto results = losses(micro_batches, hooks);
  if (hooks.after_forward) hooks.after_forward(results);
  backward(hooks);
  micros_.clear();
  return results;
}

std::vector<at::Tensor> BlockLoop::forward_only(std::span<const MicroBatch> batches,
                                                const ForwardHooks& hooks) {
  const at::NoGradGuard no_grad;
  begin(batches, {}, false);
  blocks_.pass([&](int64_t block) {
    if (hooks.entered) hooks.entered(block);
    for (Micro& micro : micros_) {
      const MemoryScope scope(MemoryCause::kWorkingSet);
      const Values in = std::exchange(micro.values, {});
      micro.values = run_block(block, micro, in, micro.vec);
    }
    if (hooks.leaving) hooks.leaving(block);
    return false;
  });
  std::vector<at::Tensor> results;
  for (size_t m = 0; m < micros_.size(); ++m) {
    const at::Tensor x = std::exchange(micros_[m].values, {})[0];
    results.push_back(batches[m].loss(velocity_of(micros_[m], x, micros_[m].vec)));
  }
  micros_.clear();
  return results;
}

}  // namespace flux::engine
