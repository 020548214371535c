#include "pipelines/train/options.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>
#include <vector>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/engine/size.h"
#include "pipelines/train/lora_options.h"
#include "pipelines/train/optimizer.h"
#include "pipelines/train/time_limit.h"

namespace flux::train {
namespace {

const Choices<Method> kMethods{{"lora", Method::kLora}, {"full", Method::kFull}};
const Choices<OptimizerKind> kOptimizers{{"adamw", OptimizerKind::kAdamW},
                                         {"adamw8bit", OptimizerKind::kAdamW8bit},
                                         {"adafactor", OptimizerKind::kAdafactor},
                                         {"lion", OptimizerKind::kLion},
                                         {"prodigy", OptimizerKind::kProdigy},
                                         {"schedulefree", OptimizerKind::kScheduleFree},
                                         {"sgd", OptimizerKind::kSgd}};
const Choices<StateDtype> kStateDtypes{{"f32", StateDtype::kF32}, {"bf16", StateDtype::kBF16}};
const Choices<WeightMode> kWeightModes{{"stochastic", WeightMode::kStochastic},
                                       {"nearest", WeightMode::kNearest},
                                       {"kahan", WeightMode::kKahan},
                                       {"master", WeightMode::kMaster}};
const Choices<engine::ClipMode> kClips{{"global", engine::ClipMode::kGlobal},
                                       {"per-parameter", engine::ClipMode::kPerParameter},
                                       {"none", engine::ClipMode::kNone}};
const Choices<BasePrecision> kBases{{"bf16", BasePrecision::kAsComputed},
                                    {"fp8", BasePrecision::kFp8},
                                    {"nf4", BasePrecision::kNf4}};
const Choices<engine::InputPlace> kInputPlaces{{"device", engine::InputPlace::kDevice},
                                               {"host", engine::InputPlace::kHost},
                                               {"disk", engine::InputPlace::kDisk}};
const Choices<engine::StreamFrom> kStreamFroms{{"file", engine::StreamFrom::kFile},
                                               {"host", engine::StreamFrom::kHost}};
const Choices<Precision> kPrecisions{
    {"auto", Precision::kAuto}, {"f32", Precision::kF32}, {"bf16", Precision::kBF16}};
const Choices<Posterior> kPosteriors{{"sample", Posterior::kSample}, {"mean", Posterior::kMean}};
const Choices<SaveDtype> kSaveDtypes{
    {"bf16", SaveDtype::kBF16}, {"f16", SaveDtype::kF16}, {"f32", SaveDtype::kF32}};
const Choices<TimestepSampling> kSamplings{{"flux_shift", TimestepSampling::kFluxShift},
                                           {"shift", TimestepSampling::kShift},
                                           {"sigmoid", TimestepSampling::kSigmoid},
                                           {"uniform", TimestepSampling::kUniform},
                                           {"sigma", TimestepSampling::kSigma}};
const Choices<WeightingScheme> kWeightings{{"none", WeightingScheme::kNone},
                                           {"sigma_sqrt", WeightingScheme::kSigmaSqrt},
                                           {"cosmap", WeightingScheme::kCosmap},
                                           {"logit_normal", WeightingScheme::kLogitNormal},
                                           {"mode", WeightingScheme::kMode},
                                           // sd-scripts' other word for none
                                           {"uniform", WeightingScheme::kNone}};
const Choices<Prediction> kPredictions{{"raw", Prediction::kRaw},
                                       {"additive", Prediction::kAdditive},
                                       {"sigma_scaled", Prediction::kSigmaScaled}};
const Choices<MaskedLoss> kMaskedLosses{{"auto", MaskedLoss::kAuto},
                                        {"on", MaskedLoss::kOn},
                                        {"renormalised", MaskedLoss::kRenormalised},
                                        {"off", MaskedLoss::kOff}};
const Choices<TextMask> kTextMasks{
    {"cache", TextMask::kAsCached}, {"on", TextMask::kOn}, {"off", TextMask::kOff}};
const Choices<LossType> kLosses{{"l2", LossType::kL2},
                                {"l1", LossType::kL1},
                                {"huber", LossType::kHuber},
                                {"smooth_l1", LossType::kSmoothL1}};
const Choices<HuberSchedule> kHuberSchedules{{"constant", HuberSchedule::kConstant},
                                             {"exponential", HuberSchedule::kExponential},
                                             {"snr", HuberSchedule::kSnr}};

template <class E>
std::string word(const Choices<E>& choices, E value) {
  for (const auto& [text, choice] : choices) {
    if (choice == value) return text;
  }
  throw std::invalid_argument("a choice without a name");
}

void steps_flag(Tool& tool, const char* name, StepsOrShare& value, const char* help) {
  tool.flag(name, "N|SHARE", help, "0", [&value](const std::string& text) {
    const char* const end = text.data() + text.size();
    StepsOrShare read;
    const auto whole = std::from_chars(text.data(), end, read.steps);
    if (whole.ec != std::errc() || whole.ptr != end) {
      read.steps = 0;
      const auto part = std::from_chars(text.data(), end, read.share);
      if (part.ec != std::errc() || part.ptr != end || !(read.share >= 0 && read.share < 1))
        throw UsageError("'" + printable(text) +
                         "' is neither a number of steps nor a share of the run such as 0.05");
    }
    if (read.steps < 0 || read.steps > 1'000'000'000)
      throw UsageError("'" + printable(text) + "' is not in [0, 1000000000]");
    value = read;
  });
}

/// Whole number of `text`, nothing if it is none in [0, 1e9].
std::optional<int64_t> count_of(std::string_view text) {
  int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || value < 0 || value > 1'000'000'000)
    return std::nullopt;
  return value;
}

SaveEvery save_every_of(const std::string& text) {
  if (const auto steps = count_of(text)) return {.steps = *steps};
  const std::string_view view = text;
  if (view.ends_with("ep"))
    if (const auto epochs = count_of(view.substr(0, view.size() - 2)); epochs && *epochs > 0)
      return {.epochs = *epochs};
  if (view.ends_with("min")) {
    SaveEvery every;
    const char* const end = view.data() + view.size() - 3;
    const auto [stop, error] = std::from_chars(view.data(), end, every.minutes);
    if (error == std::errc() && stop == end && every.minutes > 0 && every.minutes <= 1e6)
      return every;
  }
  throw UsageError("'" + printable(text) +
                   "' is neither a number of steps nor one of epochs such as 2ep or of minutes "
                   "such as 30min");
}

/// "0.1,0.5,0.9"
std::vector<double> sigmas_of(const std::string& text) {
  std::vector<double> out;
  for (const std::string& part : split(text, ',')) {
    const std::string_view word = trim(part);
    const char* const end = word.data() + word.size();
    double sigma = 0;
    const auto [stop, error] = std::from_chars(word.data(), end, sigma);
    if (error != std::errc() || stop != end || !(sigma > 0 && sigma <= 1))
      throw UsageError("'" + printable(word) + "' is not a noise level in (0, 1]");
    if (std::ranges::find(out, sigma) != out.end())
      throw UsageError("'" + printable(word) + "' is there twice");
    out.push_back(sigma);
  }
  if (out.size() > 100) throw UsageError("more than 100 noise levels");
  return out;
}

nlohmann::json value_of(const SaveEvery& every) {
  if (every.epochs > 0) return fmt::format("{}ep", every.epochs);
  if (every.minutes > 0) return fmt::format("{}min", every.minutes);
  return every.steps;
}

nlohmann::json number_of(const StepsOrShare& value) {
  if (value.share > 0) return value.share;
  return value.steps;
}

void resolution_flag(Tool& tool, Options& o) {
  tool.flag("resolution",
            "WxH",
            "of --plan: the largest pictures, in pixels",
            "",
            [&o](const std::string& text) {
              std::tie(o.plan_width, o.plan_height) = engine::picture_size(text);
            });
}

bool uses_scale(const Options& o) {
  const auto sampling = o.timesteps.sampling;
  return sampling == TimestepSampling::kFluxShift || sampling == TimestepSampling::kShift ||
         sampling == TimestepSampling::kSigmoid;
}
bool uses_shift(const Options& o) {
  return o.timesteps.sampling == TimestepSampling::kShift ||
         o.timesteps.sampling == TimestepSampling::kSigma;
}
bool weighs_loss(const Options& o) {
  return o.timesteps.weighting == WeightingScheme::kSigmaSqrt ||
         o.timesteps.weighting == WeightingScheme::kCosmap;
}
bool uses_weighting(const Options& o) {
  return o.timesteps.sampling == TimestepSampling::kSigma || weighs_loss(o) ||
         o.timesteps.weighting == WeightingScheme::kNone;
}
bool uses_logit(const Options& o) {
  return uses_weighting(o) && o.timesteps.weighting == WeightingScheme::kLogitNormal;
}
bool uses_mode(const Options& o) {
  return uses_weighting(o) && o.timesteps.weighting == WeightingScheme::kMode;
}
bool uses_huber(const Options& o) {
  return o.loss.type == LossType::kHuber || o.loss.type == LossType::kSmoothL1;
}
bool uses_warmup(const Options& o) {
  return o.lr.schedule != LrSchedule::kConstant && o.lr.schedule != LrSchedule::kPiecewiseConstant;
}
bool needs_num_steps(const Options& o) {
  return (uses_warmup(o) && o.lr.schedule != LrSchedule::kConstantWithWarmup &&
          o.lr.schedule != LrSchedule::kInverseSqrt) ||
         (uses_warmup(o) && o.lr_warmup.share > 0);
}
bool uses_min_lr(const Options& o) {
  return uses_warmup(o) && o.lr.schedule != LrSchedule::kConstantWithWarmup;
}
/// Whether --state-dtype says nothing about the optimizer's states.
bool has_own_states(const Options& o) {
  return o.optimizer == OptimizerKind::kAdamW8bit || o.optimizer == OptimizerKind::kAdafactor ||
         o.optimizer == OptimizerKind::kScheduleFree;
}
bool has_schedule(const Options& o, LrSchedule schedule) { return o.lr.schedule == schedule; }

nlohmann::json resolved_options(const Options& o);

}  // namespace

void add_flags(Options& o, Tool& tool) {
  o.command_line = tool.command_line();
  tool.resolved([&o, &tool] {
    check(o, tool);
    nlohmann::json all = resolved_options(o);
    // of --plan alone: without one they would be refused
    if (o.plan != PlanOutput::kNone) all["t5-length"] = o.plan_t5_length;
    return all;
  });
  tool.about("trains FLUX.1 on cached latents and text",
             "flux-train --latents cache/latents --text cache/text --model flux1-dev.safetensors "
             "--out run --max-steps 1000");
  tool.group("input and output");
  tool.flag("latents", o.latents, "DIR", "cache of flux-cache-latents");
  tool.flag("text", o.text, "DIR", "cache of flux-cache-text");
  tool.flag("model",
            o.model,
            "FILE",
            "transformer weights: safetensors, single, sharded or a diffusers folder");
  tool.flag(
      "out", o.out, "DIR", "run folder: checkpoints, metrics.jsonl, tensorboard/, report.html");
  tool.rest_flag(
      "import-sd-scripts",
      o.import_sd_scripts,
      "ARGS...",
      "print a file for --config that does what this command line of sd-scripts does, and end");
  tool.flag("resume", o.resume, "go on from the last checkpoint in --out");
  tool.flag("allow-change",
            o.allow_change,
            "NAME",
            "with --resume: a flag that may differ from the checkpoint's run, learning-rate or "
            "latents for two; may be repeated");
  tool.flag("reproduce",
            o.reproduce,
            "FILE",
            "make a step again that was not finite, from OUT/not-finite-*.safetensors, say where "
            "the first such number is, and end; with --config OUT/run.toml");
  tool.flag("replace", o.replace, "start anew; a run in --out moves to DIR.old-N");
  tool.flag("no-tensorboard", o.no_tensorboard, "no event files in OUT/tensorboard");
  tool.flag(
      "save-every",
      "N|Nep|Nmin",
      "steps, epochs or minutes between checkpoints; the last step is always saved (0: only that)",
      "0",
      [&o](const std::string& text) { o.save_every = save_every_of(text); });
  tool.flag(
      "keep-last", o.keep_last, "N", "newest checkpoints that stay; 0 = all", 0, 1'000'000'000);
  tool.flag("time-limit",
            "TIME",
            "save and end with exit code 143 early enough before so much time since the start of "
            "the program: 4h, 1h30m, "
            "90min, or as Slurm writes it, 04:00:00",
            "none",
            [&o](const std::string& text) { o.time_limit = parse_duration(text); });
  tool.flag("no-tags",
            o.no_tags,
            "saved LoRAs hold no tags of the captions, numbers of images and repeats, or name of "
            "the model's file");
  tool.group("validation");
  tool.flag("validation-split",
            o.validation_split,
            "X",
            "share of the samples that is held out by a hash of their paths; 0 = what the data set "
            "file holds out",
            0,
            0.99);
  tool.flag("validation-seed",
            o.validation_seed,
            "S",
            "of that, and of the held-out samples' noise; 0 if not given");
  tool.flag("validate-every",
            "N|Nep|Nmin|off",
            "steps, epochs or minutes between losses of held-out samples, beside those at every "
            "checkpoint (0: only those; off: none)",
            "0",
            [&o](const std::string& text) {
              o.no_validation = text == "off";
              if (!o.no_validation) o.validate_every = save_every_of(text);
            });
  tool.flag("validation-samples",
            o.validation_samples,
            "N",
            "held-out samples that are used; all if not given",
            1,
            1'000'000'000);
  tool.flag("validation-sigmas",
            "X,...",
            "noise levels, each with noise that is always the same",
            "0.1,0.25,0.5,0.75,0.9",
            [&o](const std::string& text) { o.validation_sigmas = sigmas_of(text); });
  tool.group("training");
  tool.flag("method", o.method, kMethods, "what is trained");
  tool.flag("rank", o.rank, "R", "of the LoRA", 1, 4096);
  tool.flag("alpha", o.alpha, "A", "LoRA scale is alpha / rank; 0 = as rank", 0, 1e6);
  add_lora_flags(o, tool);
  tool.flag("lora-dtype", o.lora_dtype, kSaveDtypes, "of the saved LoRA; it is trained in f32");
  add_layout_flags(o, tool);
  tool.flag("optimizer", o.optimizer, kOptimizers, "rule of the updates");
  tool.flag("optimizer-args",
            o.optimizer_args,
            "NAME=X,...",
            "its numbers: beta1, beta2, eps, momentum, d_coef, ... (docs/training.md)");
  tool.flag("state-dtype", o.state_dtype, kStateDtypes, "of the optimizer's moments");
  tool.flag("weight-mode",
            o.weight_mode,
            kWeightModes,
            "how bfloat16 weights of --method full take small updates");
  tool.flag("ema-decay",
            "D",
            "keep an average of the weights, in which a step's share is 1 - D; 0 < D < 1",
            "none",
            [&o](const std::string& text) {
              const char* const end = text.data() + text.size();
              const auto [stop, error] = std::from_chars(text.data(), end, o.ema_decay);
              if (error != std::errc() || stop != end || !(o.ema_decay > 0 && o.ema_decay < 1))
                throw UsageError("'" + printable(text) +
                                 "' is not a number between 0 and 1 (both excluded)");
            });
  tool.flag("ema-dtype", o.ema_dtype, kStateDtypes, "of that average, which stays in host memory");
  tool.flag("max-steps",
            o.max_steps,
            "N",
            "optimizer updates in all; this or --max-epochs is needed",
            1,
            1'000'000'000);
  tool.flag(
      "max-epochs", o.max_epochs, "N", "instead: visits of the whole data set", 1, 1'000'000'000);
  tool.flag("learning-rate", o.lr.learning_rate, "X", "of the optimizer", 0, 1e15);
  tool.flag("lr-scheduler", o.lr.schedule, lr_schedules(), "learning rate over the steps");
  steps_flag(tool,
             "lr-warmup-steps",
             o.lr_warmup,
             "linear rise at the start: steps, or a share of --max-steps below 1");
  steps_flag(tool,
             "lr-decay-steps",
             o.lr_decay,
             "fall at the end of warmup_stable_decay: steps, or a share of --max-steps");
  tool.flag("min-lr-ratio",
            o.lr.min_lr_ratio,
            "X",
            "of --learning-rate: what a falling schedule ends at",
            0,
            1);
  tool.flag("lr-cycles", o.lr_cycles, "N", "falls of cosine_with_restarts", 1, 1'000'000);
  tool.flag("lr-power", o.lr.power, "X", "for polynomial", 1e-6, 100);
  tool.flag("lr-timescale",
            o.lr.num_timescale_steps,
            "N",
            "steps, for inverse_sqrt; 0 = the warm-up, 10000 without one",
            0,
            1'000'000'000);
  tool.flag("lr-step-rules",
            o.lr.step_rules,
            "RULES",
            "for piecewise_constant: 1:10,0.1:20,0.01 is factor 1 before step 10, 0.1 before 20, "
            "then 0.01");
  tool.flag("weight-decay",
            o.weight_decay,
            "X",
            "decoupled decay; 0.01, with adafactor 0, if not given",
            0,
            100);
  tool.flag(
      "clip", o.clip, kClips, "by which norm gradients are clipped", "global; none with adafactor");
  tool.flag(
      "max-grad-norm", o.max_grad_norm, "X", "norm that gradients are clipped to; 0 = off", 0, 1e9);
  tool.flag(
      "batch-size", o.batch_size, "N", "samples a step; 0 = what the data set file says", 0, 65536);
  tool.flag("gradient-accumulation",
            o.gradient_accumulation,
            "N",
            "batches an update; all pass through a block while it is loaded",
            1,
            65536);
  tool.flag("seed", o.seed, "S", "of all randomness");
  tool.group("noise and loss");
  tool.flag("guidance",
            o.guidance,
            "X",
            "what the model is told, if it has a guidance input; 1 if not given",
            0,
            100);
  tool.flag("timestep-sampling", o.timesteps.sampling, kSamplings, "law of the noise level");
  tool.flag("sigmoid-scale",
            o.timesteps.sigmoid_scale,
            "X",
            "width for flux_shift, shift, sigmoid",
            1e-6,
            1000);
  tool.flag("discrete-flow-shift",
            o.timesteps.discrete_flow_shift,
            "X",
            "for shift and sigma",
            1e-6,
            1000);
  tool.flag("weighting-scheme",
            o.timesteps.weighting,
            kWeightings,
            "logit_normal, mode: density for sigma; sigma_sqrt, cosmap: weight of the loss");
  tool.flag("logit-mean", o.timesteps.logit_mean, "X", "for logit_normal", -1000, 1000);
  tool.flag("logit-std", o.timesteps.logit_std, "X", "for logit_normal", 1e-6, 1000);
  tool.flag(
      "mode-scale", o.timesteps.mode_scale, "X", "for mode", kSmallestModeScale, kLargestModeScale);
  tool.flag("min-timestep",
            o.timesteps.min_timestep,
            "X",
            "noise levels are drawn from this on, of 1000",
            0,
            1000);
  tool.flag("max-timestep", o.timesteps.max_timestep, "X", "and up to this", 0, 1000);
  tool.flag("stratified-timesteps",
            o.timesteps.stratified,
            "spread the noise levels of an update evenly over their law");
  tool.flag("model-prediction-type",
            o.loss.prediction,
            kPredictions,
            "what the loss compares, output and target alike: velocity, x_t + velocity (the same "
            "loss), latents");
  tool.flag("loss-type", o.loss.type, kLosses, "of the difference from the target");
  tool.flag(
      "huber-schedule", o.loss.huber_schedule, kHuberSchedules, "of huber-c over the noise level");
  tool.flag("huber-c", o.loss.huber_c, "X", "for huber and smooth_l1", 1e-9, 1e9);
  tool.flag("huber-scale", o.loss.huber_scale, "X", "factor of huber-c's schedule", 1e-9, 1e9);
  tool.flag("posterior", o.posterior, kPosteriors, "latents: a draw at each visit, or the mean");
  tool.flag_or(
      "masked-loss",
      "auto|on|renormalised|off",
      "on",
      "masks of the latents cache weigh the loss: where there are any (auto, if not "
      "given); renormalised: by the mask's mean, so that its area does not matter",
      [&o](const std::string& text) {
        for (const auto& [known, choice] : kMaskedLosses)
          if (known == text) {
            o.masked_loss = choice;
            return;
          }
        throw UsageError("'" + printable(text) + "' is not one of auto|on|renormalised|off");
      });
  tool.flag("text-mask",
            o.text_mask,
            kTextMasks,
            "attention leaves out padding of the text; cache: as the text was encoded");
  tool.flag("ip-noise-gamma",
            o.ip_noise_gamma,
            "X",
            "noise added to the input's noise and not to the target's",
            0,
            10);
  tool.flag("ip-noise-gamma-random-strength",
            o.ip_noise_gamma_random_strength,
            "a strength in [0, --ip-noise-gamma) for each visit");
  tool.flag("prior-loss-weight", o.prior_loss_weight, "X", "of regularisation images", 0, 1e6);
  tool.group("pictures on the way");
  tool.flag("sample-every",
            o.sample_every,
            "N",
            "steps between pictures' latents in OUT/samples, for flux-decode; 0 = none; needs "
            "--prompts",
            0,
            1'000'000'000);
  tool.flag("prompts", o.prompts, "DIR", "text cache of flux-cache-text --prompts: what to sample");
  tool.flag("sample-size",
            "WxH",
            "pixels, multiples of 16",
            "the largest that are trained on",
            [&o](const std::string& text) {
              std::tie(o.sample_width, o.sample_height) = engine::picture_size(text);
            });
  tool.flag("sample-steps",
            o.sample_steps,
            "N",
            "Euler steps of a picture; 20, 4 for a model without guidance, if not given",
            1,
            10'000);
  tool.flag("sample-guidance",
            o.sample_guidance,
            "X",
            "what the model is told, if it has a guidance input; 3.5 if not given",
            0,
            100);
  tool.flag("sample-seed", o.sample_seed, "S", "of the pictures' noise: as in flux-sample");
  tool.flag("sample-count", o.sample_count, "N", "pictures of each prompt", 1, 10'000);
  tool.group("machine");
  tool.flag("device", o.device, device_choices(), "where to train");
  tool.flag("precision",
            o.precision,
            kPrecisions,
            "of the transformer; auto = bf16 on CUDA, f32 on the CPU");
  tool.flag(
      "base-precision", o.base, kBases, "of a LoRA's frozen weights; bf16 = as --precision says");
  tool.group("memory");
  tool.bytes_flag(
      "device-memory", o.device_memory, "what the run may take of the GPU", "90 % of what is free");
  tool.bytes_flag(
      "host-memory", o.host_memory, "what the run may take of the machine", "80 % of what is free");
  tool.flag_or("plan",
               "table|json",
               "table",
               "print what the run would take and whether it fits (exit 0, or 5), and end; needs "
               "--model, --method, --resolution",
               [&o](const std::string& text) {
                 if (text != "table" && text != "json")
                   throw UsageError("'" + printable(text) + "' is not one of table|json");
                 o.plan = text == "json" ? PlanOutput::kJson : PlanOutput::kTable;
               });
  resolution_flag(tool, o);
  tool.flag("t5-length", o.plan_t5_length, "N", "of --plan: text tokens", 1, 512);
  tool.flag("resident-blocks",
            o.resident_blocks,
            "N",
            "blocks whose weights stay in memory; else the plan's",
            0,
            1000);
  tool.flag("keep-graphs",
            o.kept_graphs,
            "N",
            "blocks that are not run again in the backward, the last ones; else the plan's",
            0,
            1000);
  tool.flag(
      "ring-slots", o.ring_slots, "N", "blocks in memory at a time of those that stream", 2, 4);
  tool.flag("stream-adapters",
            o.stream_adapters,
            "of blocks that stream: a LoRA and its optimizer's states come and go with them");
  tool.flag("stream-states",
            o.stream_states,
            "with --method full: the optimizer's states of blocks that stay in memory stream too");
  tool.flag("block-inputs",
            o.block_inputs,
            kInputPlaces,
            "where the forward keeps what the backward needs",
            "the plan's");
  tool.flag("stream-from",
            o.stream_from,
            kStreamFroms,
            "where streamed weights are",
            "file; host on a GPU");
  tool.flag("scratch",
            o.scratch,
            "DIR",
            "for scratch files, which leave nothing behind; --out if not given");
  tool.group("several ranks");
  tool.flag("dist-rank",
            o.dist.rank,
            "R",
            "which rank this is, from 0; else as torchrun, srun or mpirun says",
            0,
            1 << 20);
  tool.flag(
      "dist-world", o.dist.world, "N", "how many ranks there are; with --dist-rank", 1, 1 << 20);
  tool.flag("dist-store",
            o.dist.store,
            "HOST:PORT|FILE",
            "where ranks meet, or a path with a slash of a file that rank 0 writes its address to; "
            "else as the launcher says, or such a file beside --out");
  tool.flag(
      "dist-start-timeout", o.dist_start_timeout, "S", "seconds to wait for all ranks", 1, 86400);
  tool.flag("dist-timeout",
            o.dist_timeout,
            "S",
            "seconds without a sign of life after which a rank is taken for dead",
            2,
            86400);
  tool.flag("dist-shard",
            o.dist_shard,
            "N",
            "with --method full: ranks that share one copy of weights and states, as many as a "
            "machine has for one copy a machine; 1: each has all; all ranks if not given",
            1,
            1 << 20);
  tool.flag("exact-reduction",
            o.exact_reduction,
            "gradients are summed in the order of the step's batches: the bits of one rank that "
            "accumulates");
  tool.group("reading");
  tool.flag("reader-threads", o.reader_threads, "N", "threads that read batches ahead", 1, 256);
  tool.flag("prefetch", o.prefetch, "N", "batches read ahead at most", 1, 4096);
  tool.flag("rehash", o.rehash, "hash the model anew instead of remembering its hash");
}

namespace {

void require_given(const std::string& name, bool given, const std::string& hint) {
  if (!given) throw UsageError(fmt::format("--{} is missing", name), hint);
}

void check_plan(const Options& o, const Tool& tool) {
  for (const char* name : {"model", "method", "resolution"})
    require_given(name, tool.given(name), "--plan needs --model, --method and --resolution WxH");
  if (!o.resume && !o.replace && o.reproduce.empty()) return;
  throw UsageError("--plan does nothing with --resume, --replace or --reproduce", "leave it out");
}

void check_schedule(const Options& o) {
  const LrOptions lr = o.effective_lr();
  if (lr.schedule == LrSchedule::kPiecewiseConstant) {
    constexpr char kHint[] = "factors with the step each ends at, and one more: 1:500,0.1:800,0.01";
    if (lr.step_rules.empty())
      throw UsageError("--lr-scheduler piecewise_constant needs --lr-step-rules", kHint);
    try {
      check_step_rules(lr.step_rules);
    } catch (const std::invalid_argument& error) {
      throw UsageError(fmt::format("--lr-step-rules: {}", printable(error.what())), kHint);
    }
  }
  if (lr.schedule == LrSchedule::kWarmupStableDecay) {
    if (lr.num_decay_steps == 0)
      throw UsageError("--lr-scheduler warmup_stable_decay needs --lr-decay-steps",
                       "give steps, or a share of the run such as 0.2");
    if (lr.num_warmup_steps + lr.num_decay_steps > lr.num_steps)
      throw UsageError(
          fmt::format("{} steps of warm-up and {} of decay are more than --max-steps {}",
                      lr.num_warmup_steps,
                      lr.num_decay_steps,
                      lr.num_steps),
          "lower --lr-warmup-steps or --lr-decay-steps");
  }
  if (lr.schedule == LrSchedule::kPolynomial && lr.learning_rate <= lr.lr_end)
    throw UsageError(fmt::format("--lr-scheduler polynomial falls to {}, --learning-rate is {}",
                                 lr.lr_end,
                                 lr.learning_rate),
                     "give a higher --learning-rate, or a --min-lr-ratio below 1");
}

void check_memory(const Options& o, const Tool& tool) {
  if (o.method == Method::kFull) {
    for (const char* name : {"rank", "alpha", "lora-dtype", "lora-layout", "base-precision"})
      if (tool.given(name))
        throw UsageError(fmt::format("--{} has no effect with --method full", name),
                         "leave it out");
  }
  if (o.method == Method::kLora && tool.given("model-layout"))
    throw UsageError("--model-layout has no effect with --method lora",
                     "--lora-layout says what a LoRA is saved as");
  if (o.method == Method::kLora && o.stream_states)
    throw UsageError("--stream-states has no effect with --method lora",
                     "--stream-adapters does the same for a LoRA");
  if (o.plan == PlanOutput::kNone) {
    for (const char* name : {"resolution", "t5-length"})
      if (tool.given(name))
        throw UsageError(fmt::format("--{} has no effect without --plan: the caches say it", name),
                         "leave it out");
  }
  if (o.clip && *o.clip != engine::ClipMode::kNone && o.max_grad_norm == 0)
    throw UsageError("--clip contradicts --max-grad-norm 0", "leave one of them out");
  if (o.clip == engine::ClipMode::kNone && tool.given("max-grad-norm") && o.max_grad_norm != 0)
    throw UsageError("--max-grad-norm has no effect with --clip none", "leave one of them out");
}

void check_optimizer(const Options& o, const Tool& tool) {
  optimizer_options(o);
  const auto refuse = [&](const char* flag, const char* why) {
    if (tool.given(flag))
      throw UsageError(fmt::format("--{} has no effect with {}", flag, why), "leave it out");
  };
  if (o.ema_decay == 0 && tool.given("ema-dtype"))
    throw UsageError("--ema-dtype has no effect here", "it needs --ema-decay; or leave it out");
  if (o.method == Method::kLora) refuse("weight-mode", "--method lora, which trains float32");
  if (has_own_states(o))
    refuse("state-dtype",
           ("--optimizer " + word(kOptimizers, o.optimizer) + ", whose states are as they are")
               .c_str());
}

void check_ranks(const Options& o, const Tool& tool) {
  if (!o.launch.several()) {
    for (const char* name : {"dist-store", "dist-timeout", "dist-start-timeout", "dist-shard"})
      if (tool.given(name))
        throw UsageError(fmt::format("--{} has no effect with one rank", name),
                         "start several with torchrun, srun or mpirun, or give --dist-rank and "
                         "--dist-world; or leave it out");
    return;
  }
  if (tool.given("dist-shard") && o.method == Method::kLora)
    throw UsageError(
        "--dist-shard has no effect with --method lora: every rank has all of the model",
        "leave it out");
  const int64_t sharing = o.shard_world();
  if (o.launch.world % sharing != 0)
    throw UsageError(
        fmt::format("--dist-shard {}: {} ranks are no multiple of it", sharing, o.launch.world),
        "give a divisor of the number of ranks");
  const bool whole = o.optimizer == OptimizerKind::kAdafactor ||
                     o.optimizer == OptimizerKind::kProdigy ||
                     o.optimizer == OptimizerKind::kScheduleFree;
  if (sharing > 1 && whole)
    throw UsageError(fmt::format("--optimizer {} needs all of the weights in each rank, of which "
                                 "{} would share a copy",
                                 word(kOptimizers, o.optimizer),
                                 sharing),
                     "--dist-shard 1 gives each rank all of them; or take another optimizer");
  if (!o.reproduce.empty()) throw UsageError("--reproduce runs in one rank", "start one");
}

}  // namespace

double Options::effective_weight_decay() const {
  const bool adamw = optimizer == OptimizerKind::kAdamW || optimizer == OptimizerKind::kAdamW8bit;
  return weight_decay.value_or(adamw ? 0.01 : 0);
}

LrOptions Options::effective_lr() const {
  LrOptions full = lr;
  full.num_steps = max_steps;
  full.num_warmup_steps = lr_warmup.of(max_steps);
  full.num_decay_steps = lr_decay.of(max_steps);
  full.num_cycles = static_cast<double>(lr_cycles);
  if (lr.min_lr_ratio > 0) full.lr_end = lr.min_lr_ratio * lr.learning_rate;
  return full;
}

engine::ClipMode Options::effective_clip() const {
  if (max_grad_norm == 0) return engine::ClipMode::kNone;
  return clip.value_or(optimizer == OptimizerKind::kAdafactor ? engine::ClipMode::kNone
                                                              : engine::ClipMode::kGlobal);
}

void check(Options& o, const Tool& tool) {
  o.launch = dist::resolve_launch(dist::process_environment(), o.dist);
  check_ranks(o, tool);
  check_memory(o, tool);
  check_lora(o, tool);
  check_optimizer(o, tool);
  if (o.plan != PlanOutput::kNone) return check_plan(o, tool);
  if (!o.reproduce.empty() && (o.resume || o.replace))
    throw UsageError("--reproduce trains nothing: --resume and --replace have no effect with it",
                     "leave them out");
  for (const auto& [name, path] :
       {std::pair{"latents", &o.latents}, {"text", &o.text}, {"model", &o.model}, {"out", &o.out}})
    require_given(name, !path->empty(), "--help has an example");
  require_given("max-steps",
                o.max_steps != 0 || o.max_epochs != 0,
                "give the number of optimizer updates, 1000 for one, or --max-epochs");
  if (o.max_steps != 0 && o.max_epochs != 0)
    throw UsageError("--max-steps and --max-epochs are both given", "give one of them");
  if (o.resume && o.replace)
    throw UsageError("--resume and --replace contradict each other", "give one of them");
  if (!o.resume && !o.allow_change.empty())
    throw UsageError("--allow-change has no effect without --resume", "leave it out");
  const std::vector<std::tuple<const char*, bool, const char*>> dependent{
      {"sigmoid-scale", uses_scale(o), "--timestep-sampling flux_shift, shift or sigmoid"},
      {"discrete-flow-shift", uses_shift(o), "--timestep-sampling shift or sigma"},
      {"weighting-scheme", uses_weighting(o), "--timestep-sampling sigma"},
      {"logit-mean", uses_logit(o), "--timestep-sampling sigma --weighting-scheme logit_normal"},
      {"logit-std", uses_logit(o), "--timestep-sampling sigma --weighting-scheme logit_normal"},
      {"mode-scale", uses_mode(o), "--timestep-sampling sigma --weighting-scheme mode"},
      {"huber-schedule", uses_huber(o), "--loss-type huber or smooth_l1"},
      {"huber-c", uses_huber(o), "--loss-type huber or smooth_l1"},
      {"huber-scale", uses_huber(o), "--loss-type huber or smooth_l1"},
      {"ip-noise-gamma-random-strength", o.ip_noise_gamma > 0, "--ip-noise-gamma"},
      {"lr-warmup-steps",
       uses_warmup(o),
       "an --lr-scheduler other than constant and piecewise_constant"},
      {"lr-decay-steps",
       has_schedule(o, LrSchedule::kWarmupStableDecay),
       "--lr-scheduler warmup_stable_decay"},
      {"min-lr-ratio", uses_min_lr(o), "an --lr-scheduler that falls"},
      {"lr-cycles",
       has_schedule(o, LrSchedule::kCosineWithRestarts),
       "--lr-scheduler cosine_with_restarts"},
      {"lr-power", has_schedule(o, LrSchedule::kPolynomial), "--lr-scheduler polynomial"},
      {"lr-timescale", has_schedule(o, LrSchedule::kInverseSqrt), "--lr-scheduler inverse_sqrt"},
      {"lr-step-rules",
       has_schedule(o, LrSchedule::kPiecewiseConstant),
       "--lr-scheduler piecewise_constant"}};
  for (const auto& [name, works, needs] : dependent) {
    if (tool.given(name) && !works) {
      throw UsageError(fmt::format("--{} has no effect here", name),
                       fmt::format("it needs {}; or leave it out", needs));
    }
  }
  if (o.no_validation)
    for (const char* name : {"validation-samples", "validation-sigmas"})
      if (tool.given(name))
        throw UsageError(fmt::format("--{} has no effect with --validate-every off", name),
                         "leave one of them out");
  if (o.sample_every > 0 && o.prompts.empty())
    throw UsageError("--sample-every needs --prompts",
                     "give a text cache of flux-cache-text --prompts");
  if (o.sample_every == 0)
    for (const char* name : {"prompts",
                             "sample-size",
                             "sample-steps",
                             "sample-guidance",
                             "sample-seed",
                             "sample-count"})
      if (tool.given(name))
        throw UsageError(fmt::format("--{} has no effect without --sample-every", name),
                         "leave it out, or give --sample-every 500 for one");
  if (o.timesteps.min_timestep >= o.timesteps.max_timestep)
    throw UsageError(fmt::format("--min-timestep {} is not below --max-timestep {}",
                                 o.timesteps.min_timestep,
                                 o.timesteps.max_timestep),
                     "both are of 1000, pure noise");
  if (o.max_epochs == 0) check_schedule(o);
}

void set_steps(Options& o, int64_t batches_an_epoch) {
  if (o.max_epochs == 0) return;
  constexpr int64_t kMost = 1'000'000'000;
  if (o.max_epochs > kMost * o.batches_a_step() / batches_an_epoch)
    throw UsageError(
        fmt::format(
            "--max-epochs {}: an epoch has {} batches, and more than {} updates are out of range",
            o.max_epochs,
            batches_an_epoch,
            kMost),
        "give fewer");
  const int64_t batches = o.max_epochs * batches_an_epoch;
  o.max_steps = (batches + o.batches_a_step() - 1) / o.batches_a_step();
  check_schedule(o);
}

std::string block_inputs_word(engine::InputPlace place) { return word(kInputPlaces, place); }

nlohmann::json deciding_options(const Options& o) {
  nlohmann::json out{{"method", word(kMethods, o.method)},
                     {"optimizer", word(kOptimizers, o.optimizer)},
                     {"optimizer-args", o.optimizer_args},
                     {"state-dtype", word(kStateDtypes, o.state_dtype)},
                     {"clip", word(kClips, o.effective_clip())},
                     {"gradient-accumulation", o.batches_a_step()},
                     {"learning-rate", o.lr.learning_rate},
                     {"lr-scheduler", word(lr_schedules(), o.lr.schedule)},
                     {"weight-decay", o.effective_weight_decay()},
                     {"max-grad-norm", o.max_grad_norm},
                     {"batch-size", o.batch_size},
                     {"seed", o.seed},
                     {"timestep-sampling", word(kSamplings, o.timesteps.sampling)},
                     {"loss-type", word(kLosses, o.loss.type)},
                     {"model-prediction-type", word(kPredictions, o.loss.prediction)},
                     {"posterior", word(kPosteriors, o.posterior)},
                     {"masked-loss", word(kMaskedLosses, o.masked_loss)},
                     {"text-mask", word(kTextMasks, o.text_mask)},
                     {"ip-noise-gamma", o.ip_noise_gamma},
                     {"min-timestep", o.timesteps.min_timestep},
                     {"max-timestep", o.timesteps.max_timestep},
                     {"stratified-timesteps", o.timesteps.stratified},
                     {"prior-loss-weight", o.prior_loss_weight},
                     {"guidance", o.guidance.value_or(1)}};
  if (o.validation_split > 0) {
    out["validation-split"] = o.validation_split;
    out["validation-seed"] = o.validation_seed.value_or(0);
  }
  if (o.method == Method::kFull) out["weight-mode"] = word(kWeightModes, o.weight_mode);
  if (o.ema_decay > 0) {
    out["ema-decay"] = o.ema_decay;
    out["ema-dtype"] = word(kStateDtypes, o.ema_dtype);
  }
  if (o.method == Method::kLora) {
    out["rank"] = o.rank;
    out["alpha"] = o.effective_alpha();
    out["base-precision"] = word(kBases, o.base);
    add_lora_deciding(o, out);
  }
  if (uses_warmup(o)) out["lr-warmup-steps"] = number_of(o.lr_warmup);
  if (uses_min_lr(o)) out["min-lr-ratio"] = o.lr.min_lr_ratio;
  if (has_schedule(o, LrSchedule::kWarmupStableDecay))
    out["lr-decay-steps"] = number_of(o.lr_decay);
  if (has_schedule(o, LrSchedule::kCosineWithRestarts)) out["lr-cycles"] = o.lr_cycles;
  if (has_schedule(o, LrSchedule::kPolynomial)) out["lr-power"] = o.lr.power;
  if (has_schedule(o, LrSchedule::kInverseSqrt)) out["lr-timescale"] = o.lr.num_timescale_steps;
  if (has_schedule(o, LrSchedule::kPiecewiseConstant)) out["lr-step-rules"] = o.lr.step_rules;
  if (o.ip_noise_gamma > 0)
    out["ip-noise-gamma-random-strength"] = o.ip_noise_gamma_random_strength;
  if (needs_num_steps(o)) out["max-steps"] = o.max_steps;
  if (uses_scale(o)) out["sigmoid-scale"] = o.timesteps.sigmoid_scale;
  if (uses_shift(o)) out["discrete-flow-shift"] = o.timesteps.discrete_flow_shift;
  if (o.timesteps.weighting != WeightingScheme::kNone ||
      o.timesteps.sampling == TimestepSampling::kSigma)
    out["weighting-scheme"] = word(kWeightings, o.timesteps.weighting);
  if (uses_logit(o)) {
    out["logit-mean"] = o.timesteps.logit_mean;
    out["logit-std"] = o.timesteps.logit_std;
  }
  if (uses_mode(o)) out["mode-scale"] = o.timesteps.mode_scale;
  if (uses_huber(o)) {
    out["huber-schedule"] = word(kHuberSchedules, o.loss.huber_schedule);
    out["huber-c"] = o.loss.huber_c;
    out["huber-scale"] = o.loss.huber_scale;
  }
  return out;
}

namespace {

/// All that takes effect, by flag name, as --config reads it.
nlohmann::json resolved_options(const Options& o) {
  nlohmann::json all = deciding_options(o);
  all["gradient-accumulation"] = o.gradient_accumulation;  // of each rank
  if (!o.guidance) all.erase("guidance");  // would be refused with a model that has no such input
  if (o.max_epochs > 0) {
    all.erase("max-steps");
    all["max-epochs"] = o.max_epochs;
  } else {
    all["max-steps"] = o.max_steps;
  }
  all["save-every"] = value_of(o.save_every);
  all["keep-last"] = o.keep_last;
  if (o.time_limit > 0) all["time-limit"] = fmt::format("{}s", o.time_limit);
  if (o.no_validation)
    all["validate-every"] = "off";
  else if (o.validate_every.any())
    all["validate-every"] = value_of(o.validate_every);
  if (o.validation_samples) all["validation-samples"] = *o.validation_samples;
  if (o.validation_seed) all["validation-seed"] = *o.validation_seed;
  if (!o.validation_sigmas.empty())
    all["validation-sigmas"] = fmt::format("{}", fmt::join(o.validation_sigmas, ","));
  if (o.method == Method::kLora) all["lora-dtype"] = word(kSaveDtypes, o.lora_dtype);
  add_layouts(o, all);
  if (o.effective_clip() == engine::ClipMode::kNone) all.erase("max-grad-norm");
  if (has_own_states(o)) all.erase("state-dtype");
  if (o.device_memory > 0) all["device-memory"] = std::to_string(o.device_memory);
  if (o.host_memory > 0) all["host-memory"] = std::to_string(o.host_memory);
  for (const auto& [name, value] : {std::pair{"resident-blocks", o.resident_blocks},
                                    {"keep-graphs", o.kept_graphs},
                                    {"ring-slots", o.ring_slots}})
    if (value) all[name] = *value;
  if (o.block_inputs) all["block-inputs"] = word(kInputPlaces, *o.block_inputs);
  if (o.stream_from) all["stream-from"] = word(kStreamFroms, *o.stream_from);
  if (o.stream_adapters) all["stream-adapters"] = true;
  if (o.stream_states) all["stream-states"] = true;
  if (o.no_tensorboard) all["no-tensorboard"] = true;
  if (o.no_tags) all["no-tags"] = true;
  if (o.sample_every > 0) {
    all["sample-every"] = o.sample_every;
    all["sample-seed"] = o.sample_seed;
    all["sample-count"] = o.sample_count;
    if (o.sample_width > 0)
      all["sample-size"] = fmt::format("{}x{}", o.sample_width, o.sample_height);
    if (o.sample_steps) all["sample-steps"] = *o.sample_steps;
    if (o.sample_guidance) all["sample-guidance"] = *o.sample_guidance;
  }
  all["precision"] = word(kPrecisions, o.precision);
  all["device"] = word(device_choices(), o.device);
  if (o.exact_reduction) all["exact-reduction"] = true;
  if (o.launch.several()) {
    if (o.dist_shard > 0) all["dist-shard"] = o.dist_shard;
    all["dist-timeout"] = o.dist_timeout;
    all["dist-start-timeout"] = o.dist_start_timeout;
  }
  all["reader-threads"] = o.reader_threads;
  all["prefetch"] = o.prefetch;
  return all;
}

}  // namespace

std::string run_toml(const Options& o) {
  nlohmann::json all = resolved_options(o);
  std::string out = "# flux-train --config run.toml\n";
  for (const auto& [name, path] : {std::pair{"latents", &o.latents},
                                   {"text", &o.text},
                                   {"prompts", &o.prompts},
                                   {"model", &o.model},
                                   {"out", &o.out},
                                   {"scratch", &o.scratch}}) {
    if (path->empty()) continue;
    // a path that is not UTF-8 cannot stand in TOML
    if (first_invalid_utf8(path->native())) {
      out += fmt::format("# {}: {}\n", name, printable(path->native()));
    } else {
      all[name] = path->native();
    }
  }
  // a JSON string, number or boolean is the same text in TOML
  for (const auto& [name, value] : all.items()) out += fmt::format("{} = {}\n", name, value.dump());
  return out;
}

}  // namespace flux::train
