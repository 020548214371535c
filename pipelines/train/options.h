// pipelines/train/options.h - what flux-train is asked to do.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "common/dist/launch.h"
#include "common/engine/choices.h"
#include "common/models/lora/selection.h"
#include "common/optim/weight_mode.h"
#include "common/tensor/device.h"
#include "common/train/loss.h"
#include "common/train/lr_schedule.h"
#include "common/train/timesteps.h"

namespace flux {
class Tool;
namespace dit {
enum class ModelLayout;
}
namespace lora {
enum class Layout;
}
}  // namespace flux

namespace flux::train {

enum class Method { kLora, kFull };
enum class OptimizerKind { kAdamW, kAdamW8bit, kAdafactor, kLion, kProdigy, kScheduleFree, kSgd };
enum class StateDtype { kF32, kBF16 };
enum class BasePrecision { kAsComputed, kFp8, kNf4 };
enum class PlanOutput { kNone, kTable, kJson };
enum class Precision { kAuto, kF32, kBF16 };
enum class Posterior { kSample, kMean };
/// Of loss masks: honoured if there are any; needed; needed, and each sample's loss divided by its mask's mean; ignored.
enum class MaskedLoss { kAuto, kOn, kRenormalised, kOff };
/// Whether the transformer's attention leaves out padding of the text.
enum class TextMask { kAsCached, kOn, kOff };

/// A number of steps, or a share of --max-steps.
struct StepsOrShare {
  int64_t steps = 0;
  double share = 0;  // in (0, 1); 0: steps
  int64_t of(int64_t total) const {
    return share > 0 ? static_cast<int64_t>(share * static_cast<double>(total)) : steps;
  }
  bool any() const { return steps > 0 || share > 0; }
};

enum class SaveDtype { kBF16, kF16, kF32 };

/// When checkpoints are made: every so many steps, epochs or minutes; none of them: at the end only.
struct SaveEvery {
  int64_t steps = 0, epochs = 0;
  double minutes = 0;  // by a clock that nobody sets, since the checkpoint before
  bool any() const { return steps > 0 || epochs > 0 || minutes > 0; }
};

/// Defaults train FLUX properly (design, section 3): raw velocity target, flux_shift timesteps,
/// guidance 1.
struct Options {
  std::filesystem::path latents, text, model, out;
  bool resume = false, replace = false;
  std::vector<std::string> allow_change;  // names of flags that a resumed run may have otherwise
  bool no_tensorboard = false;
  SaveEvery save_every;
  int64_t keep_last = 0;  // checkpoints that stay; 0: all
  double time_limit = 0;  // seconds after the start of the process; 0: none
  bool no_tags = false;   // saved files hold nothing of captions and names

  double validation_split = 0;  // share that is held out, of caches that hold out nothing
  bool no_validation = false;   // none of the losses below
  SaveEvery validate_every;     // beside those at every checkpoint
  /// What the user said; see effective_validation_sigmas() for the second, 0 is the default of the others.
  std::optional<int64_t> validation_samples, validation_seed;
  std::vector<double> validation_sigmas;

  Method method = Method::kLora;
  int64_t rank = 16;
  double alpha = 0;       // 0: as rank
  lora::Selection lora;   // which modules, and ranks of their own
  lora::Form lora_form;   // what each is made of
  lora::PathRules lr_of;  // learning rates of their own
  double loraplus_lr_ratio = 1;
  double scale_weight_norms = 0;                                     // 0: off
  double network_dropout = 0, rank_dropout = 0, module_dropout = 0;  // shares
  SaveDtype lora_dtype = SaveDtype::kBF16;
  lora::Layout lora_layout{};       // of the saved LoRA: kSdScripts or kDiffusers
  dit::ModelLayout model_layout{};  // of the saved model
  int64_t max_steps = 0;            // with max_epochs known once the caches are open
  int64_t max_epochs = 0;           // 0: max_steps says it
  LrOptions lr;                     // without the numbers of steps: see effective_lr()
  StepsOrShare lr_warmup, lr_decay;
  int64_t lr_cycles = 1;
  OptimizerKind optimizer = OptimizerKind::kAdamW;
  std::string optimizer_args;  // "beta2=0.99,eps=1e-6"
  StateDtype state_dtype = StateDtype::kF32;
  WeightMode weight_mode = WeightMode::kStochastic;  // of bfloat16 weights, with kFull
  double ema_decay = 0;                              // of an average of the weights; 0: none
  StateDtype ema_dtype = StateDtype::kF32;
  std::optional<double> weight_decay;    // nothing: the optimizer's default
  std::optional<engine::ClipMode> clip;  // nothing: global; none for Adafactor, which clips itself
  double max_grad_norm = 1;              // 0: no clipping
  int64_t gradient_accumulation = 1;     // batches an update
  int64_t seed = 0;
  int64_t batch_size = 0;  // 0: the plan's

  Precision precision = Precision::kAuto;
  BasePrecision base = BasePrecision::kAsComputed;  // of a LoRA's frozen weights
  DeviceChoice device = DeviceChoice::kAuto;

  std::optional<double> guidance;  // nothing: 1, and not read by a model without guidance
  TimestepOptions timesteps;       // its weighting is the loss's too
  LossOptions loss;
  Posterior posterior = Posterior::kSample;
  double prior_loss_weight = 1;
  MaskedLoss masked_loss = MaskedLoss::kAuto;
  TextMask text_mask = TextMask::kAsCached;
  double ip_noise_gamma = 0;
  bool ip_noise_gamma_random_strength = false;

  int64_t sample_every = 0;                     // steps; 0: no pictures
  std::filesystem::path prompts;                // text cache of the pictures
  int64_t sample_width = 0, sample_height = 0;  // pixels; 0: the largest that are trained on
  std::optional<int64_t> sample_steps;          // nothing: 20, 4 for a model without guidance
  std::optional<double> sample_guidance;        // nothing: 3.5
  int64_t sample_seed = 0, sample_count = 1;    // pictures of a prompt

  int64_t device_memory = 0, host_memory = 0;  // bytes; 0: 90 % and 80 % of what is free
  /// What the user fixed of where weights are; the plan chooses the rest.
  std::optional<int64_t> resident_blocks, kept_graphs, ring_slots;
  bool stream_adapters = false, stream_states = false;
  std::optional<engine::InputPlace> block_inputs;
  std::optional<engine::StreamFrom> stream_from;
  std::filesystem::path scratch;  // empty: the run folder
  PlanOutput plan = PlanOutput::kNone;
  int64_t plan_width = 0, plan_height = 0, plan_t5_length = 512;  // of --plan: pixels, tokens

  std::vector<std::string>
      import_sd_scripts;  // a command line of sd-scripts, and nothing is trained

  std::filesystem::path reproduce;  // a dump of a step, which is made again, and nothing is trained

  dist::LaunchFlags dist;  // which of several ranks this is, if the user says it
  int64_t dist_timeout = 30, dist_start_timeout = 300;  // seconds
  bool exact_reduction = false;  // gradients are summed in the order of the step's micro-batches
  dist::Launch launch;           // set by check()
  int64_t dist_shard = 0;        // ranks that share one copy of trained weights; 0: all

  int64_t reader_threads = 2, prefetch = 4;
  bool rehash = false;
  std::string command_line;  // for provenance

  double effective_weight_decay() const;
  std::vector<double> effective_validation_sigmas() const {
    return validation_sigmas.empty() ? std::vector{0.1, 0.25, 0.5, 0.75, 0.9} : validation_sigmas;
  }
  /// With the steps of the whole run, of warm-up and of decay.
  LrOptions effective_lr() const;
  engine::ClipMode effective_clip() const;
  /// Batches an update, of all ranks.
  int64_t batches_a_step() const { return gradient_accumulation * launch.world; }
  /// Ranks that share one copy of the weights and of their states; 1: each has all.
  int64_t shard_world() const {
    if (method == Method::kLora) return 1;
    return dist_shard > 0 ? dist_shard : launch.world;
  }
  double effective_alpha() const { return alpha > 0 ? alpha : static_cast<double>(rank); }
};

void add_flags(Options& options, Tool& tool);
/// Rules between flags. `given` tells the flags of the user from defaults: one that cannot take
/// effect is an error. Throws UsageError.
/// Finds out which of several ranks this is.
void check(Options& options, const Tool& tool);
/// With --max-epochs: sets max_steps to as many updates as those epochs need, all batches of them, and checks the learning rate's
/// schedule, which depends on it. Throws UsageError.
void set_steps(Options& options, int64_t batches_an_epoch);

/// The word of --block-inputs.
std::string block_inputs_word(engine::InputPlace place);

/// The options that decide the weights, by flag name, without those that have no effect: what a
/// resumed run must repeat.
nlohmann::json deciding_options(const Options& options);
/// All of them as a file for --config.
std::string run_toml(const Options& options);

}  // namespace flux::train
