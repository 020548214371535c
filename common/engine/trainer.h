// common/engine/trainer.h - one training step of a model that may be larger than memory.
//
//   Trainer trainer(config, file, options);       // on Meta, without a file: a plan
//   for (...) trainer.step(micro_batches, step, learning_rate);
//   trainer.flush();                              // before weights are saved
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "common/engine/block_loop.h"
#include "common/engine/gradient_exchange.h"
#include "common/engine/model_blocks.h"
#include "common/engine/updater.h"
#include "common/models/lora/lora.h"
#include "common/optim/optimizer.h"
#include "common/train/flow_loss.h"

namespace flux::engine {

/// What trades memory for time and nothing else: results do not depend on it.
struct Residency {
  int64_t resident_blocks = -1;  // the first blocks, whose weights stay; -1: all
  int64_t lookahead = 1;         // streamed blocks read ahead: 1 to 3
  StreamFrom stream_from = StreamFrom::kFile;
  int64_t kept_graphs =
      0;  // blocks that are not run again in the backward, see blocks_with_kept_graph()
  InputPlace inputs = InputPlace::kDevice;
  bool stream_adapters = false;  // of streamed blocks, with their states
  bool stream_states = false;    // of trained weights that stay; those of streamed ones always do
  bool operator==(const Residency&) const = default;
};

/// By block: whether its graph is kept from the forward to the backward. Blocks are taken from the last one on, for the
/// last ones' graphs are needed soonest: with one micro-batch the very last costs nothing. A streamed one must stay in the
/// ring meanwhile, so of them only the last lookahead + 1 can.
///   all_stream  of weights that ranks share out
std::vector<char> blocks_with_kept_graph(int64_t num_blocks,
                                         const Residency& residency,
                                         bool all_stream = false);

struct TrainerOptions {
  at::Device device = at::kCPU;
  at::ScalarType compute = at::kBFloat16;  // kFloat|kBFloat16
  bool full = false;                       // all weights; else a LoRA
  std::optional<QuantFormat> base{};       // of a LoRA's frozen weights
  lora::Selection selection{};             // of a LoRA's modules
  lora::Form form{};                       // what each has
  int64_t rank = 16;
  double alpha = 16;             // 0: each module's rank
  lora::PathRules lr_factors{};  // of the learning rate, by module path
  double up_lr_factor = 1;       // of `up`, beside them: LoRA+
  double max_weight_norm = 0;    // of each module's delta; 0: none
  AdapterDropout dropout{};      // its seed and pass are set by the trainer
  uint64_t seed = 0;
  OptimizerOptions optimizer = AdamWOptions{};
  OptimizerPrecision precision{};
  double ema_decay = 0;  // of an average of what is trained; 0: none
  at::ScalarType ema_dtype = at::kFloat;
  ClipMode clip = ClipMode::kGlobal;
  double max_norm = 1;
  LossOptions loss{};
  bool several_micro_batches = false;  // steps have more than one
  /// That share the micro-batches of a step, and with `full` the weights. Then all of them call evaluate(), predict() and
  /// ModelBlocks::pass() equally often; not with Adafactor, Prodigy or schedule-free AdamW.
  Ranks ranks{};
  Residency residency{};
  FileAccess access = kDefaultFileAccess;
  std::filesystem::path scratch{};  // folder
  bool shares_weights() const { return full && ranks.sharded(); }
};

struct TrainResult {
  double loss = 0;                      // mean over the samples of the step
  std::vector<double> sample_losses{};  // what it is the mean of, in order of micro-batches
  std::optional<double> grad_norm;      // before clipping, where it is computed
};

class Trainer {
 public:
  /// Loads what stays in memory. Throws what ModelFile, FileArena and Ring throw; std::invalid_argument for options that
  /// do not fit together; UsageError for a selection of modules that the model does not have.
  Trainer(const dit::Config& config, std::shared_ptr<ModelFile> file, TrainerOptions options);
  ~Trainer();

  /// One update; `step` counts from 1. Throws NotFinite if loss or gradients are not finite: before anything is updated,
  /// but for gradients without global clipping. On Meta the result is zero.
  /// With several ranks: this rank's micro-batches, j mod world, and `batch_sizes` of all of the step, in order. The
  /// result is of all, in every rank.
  TrainResult step(std::span<const FlowInputs> micro_batches,
                   int64_t step,
                   double learning_rate,
                   std::span<const int64_t> batch_sizes = {});
  /// From here on step() shows all that it computes with and comes to, in this order: weights and outputs of what is
  /// before the blocks, of each block, the velocity; and gradients with their norms, as they come. By names such as "weight
  /// double_blocks.0.img_mlp.0.bias", "img after double_blocks.0, micro-batch 1", "gradient of single_blocks.3.linear1.up".
  using Watch = std::function<void(const std::string& name, const at::Tensor& value)>;
  void watch(Watch watch) { watch_ = std::move(watch); }

  /// False after a step that failed when some blocks were updated and others were not.
  bool step_is_whole() const { return updater_.is_whole(); }
  /// Makes updates that wait for a block's next visit.
  void flush() { updater_.flush(); }
  /// The loss of each sample, in order of batches, by the weights as they would be saved, without gradients, dropout and
  /// LossOptions::weighting. Between steps; changes no result of theirs. On Meta the losses are zero.
  std::vector<double> evaluate(std::span<const FlowInputs> batches);

  /// The velocities [B, N, out_channels] by the same weights.
  std::vector<at::Tensor> predict(std::span<const dit::Inputs> inputs);

  ModelBlocks& model() { return model_; }
  /// The adapters to save or sample with, on the host; those that stay there share their memory with the model.
  /// `averaged`: their averages, only if Optimizer::keeps_average().
  lora::Adapters adapters(bool averaged = false);
  /// The layers with adapters; empty if all weights are trained.
  const std::vector<lora::Target>& targets() const { return targets_; }
  Optimizer& optimizer() { return *optimizer_; }
  const TrainerOptions& options() const { return options_; }

 private:
  ModelBlocks& with_adapters();
  void limit_norms(std::span<Trainable> trainables) const;
  std::vector<at::Tensor> forward_only(std::span<const MicroBatch> micro_batches);
  void take_evaluation_weights(int64_t block, std::vector<at::Tensor>& trained);
  void give_back(int64_t block, std::vector<at::Tensor>& trained);
  void gather_losses(std::span<const at::Tensor> losses,
                     std::span<const at::Tensor> by_sample,
                     std::span<const int64_t> batch_sizes,
                     TrainResult& result) const;
  LoopOptions loop_options() const;
  LoopHooks watched(LoopHooks hooks);
  void show_weights(int64_t block);
  dit::Config config_;
  TrainerOptions options_;
  std::unique_ptr<Optimizer> optimizer_;
  std::vector<lora::Target> targets_;
  std::map<std::string, double> alphas_;  // of targets, by path
  ModelBlocks model_;
  BlockLoop loop_;
  std::optional<GradientExchange> exchange_;
  Updater updater_;
  Watch watch_;
};

}  // namespace flux::engine
