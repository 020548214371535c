#include "pipelines/train/options.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/core/tool.h"

namespace flux::train {
namespace {

const Choices<Method> kMethods{{"lora", Method::kLora}, {"full", Method::kFull}};
const Choices<Precision> kPrecisions{
    {"auto", Precision::kAuto}, {"f32", Precision::kF32}, {"bf16", Precision::kBF16}};
const Choices<Posterior> kPosteriors{{"sample", Posterior::kSample}, {"mean", Posterior::kMean}};
const Choices<SaveDtype> kSaveDtypes{
    {"bf16", SaveDtype::kBF16}, {"f16", SaveDtype::kF16}, {"f32", SaveDtype::kF32}};
const Choices<LrSchedule> kSchedules{{"constant", LrSchedule::kConstant},
                                     {"constant_with_warmup", LrSchedule::kConstantWithWarmup},
                                     {"linear", LrSchedule::kLinear},
                                     {"cosine", LrSchedule::kCosine}};
const Choices<TimestepSampling> kSamplings{{"flux_shift", TimestepSampling::kFluxShift},
                                           {"shift", TimestepSampling::kShift},
                                           {"sigmoid", TimestepSampling::kSigmoid},
                                           {"uniform", TimestepSampling::kUniform},
                                           {"sigma", TimestepSampling::kSigma}};
const Choices<WeightingScheme> kDensities{{"none", WeightingScheme::kNone},
                                          {"logit_normal", WeightingScheme::kLogitNormal},
                                          {"mode", WeightingScheme::kMode}};
const Choices<LossType> kLosses{{"l2", LossType::kL2},
                                {"l1", LossType::kL1},
                                {"huber", LossType::kHuber},
                                {"smooth_l1", LossType::kSmoothL1}};
const Choices<HuberSchedule> kHuberSchedules{{"constant", HuberSchedule::kConstant},
                                             {"exponential", HuberSchedule::kExponential}};

template <class E>
std::string word(const Choices<E>& choices, E value) {
  for (const auto& [text, choice] : choices) {
    if (choice == value) return text;
  }
  throw std::invalid_argument("a choice without a name");
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
bool uses_density(const Options& o) { return o.timesteps.sampling == TimestepSampling::kSigma; }
bool uses_logit(const Options& o) {
  return uses_density(o) && o.timesteps.weighting == WeightingScheme::kLogitNormal;
}
bool uses_mode(const Options& o) {
  return uses_density(o) && o.timesteps.weighting == WeightingScheme::kMode;
}
bool uses_huber(const Options& o) {
  return o.loss.type == LossType::kHuber || o.loss.type == LossType::kSmoothL1;
}
bool uses_warmup(const Options& o) { return o.lr.schedule != LrSchedule::kConstant; }
bool needs_num_steps(const Options& o) {
  return o.lr.schedule == LrSchedule::kLinear || o.lr.schedule == LrSchedule::kCosine;
}

}  // namespace

void add_flags(Options& o, Tool& tool) {
  o.command_line = tool.command_line();
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
  tool.flag("out", o.out, "DIR", "run folder: checkpoints and metrics.jsonl");
  tool.flag("resume", o.resume, "go on from the last checkpoint in --out");
  tool.flag("replace", o.replace, "start anew; a run in --out moves to DIR.old-N");
  tool.flag("save-every",
            o.save_every,
            "STEPS",
            "checkpoint interval; the last step is always saved (0: only that)");
  tool.group("training");
  tool.flag("method", o.method, kMethods, "what is trained");
  tool.flag("rank", o.rank, "R", "of the LoRA", 1, 4096);
  tool.flag("alpha", o.alpha, "A", "LoRA scale is alpha / rank; 0 = as rank", 0, 1e6);
  tool.flag("lora-dtype", o.lora_dtype, kSaveDtypes, "of the saved LoRA; it is trained in f32");
  tool.flag("max-steps", o.max_steps, "N", "optimizer updates in all; needed", 1, 1'000'000'000);
  tool.flag("learning-rate", o.lr.learning_rate, "X", "of AdamW", 0, 100);
  tool.flag("lr-scheduler", o.lr.schedule, kSchedules, "learning rate over the steps");
  tool.flag(
      "lr-warmup-steps", o.lr.num_warmup_steps, "N", "linear rise at the start", 0, 1'000'000'000);
  tool.flag("weight-decay", o.weight_decay, "X", "decoupled decay of AdamW", 0, 100);
  tool.flag("max-grad-norm",
            o.max_grad_norm,
            "X",
            "global norm that gradients are clipped to; 0 = off",
            0,
            1e9);
  tool.flag(
      "batch-size", o.batch_size, "N", "samples a step; 0 = what the data set file says", 0, 65536);
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
  tool.flag("weighting-scheme", o.timesteps.weighting, kDensities, "density for sigma");
  tool.flag("logit-mean", o.timesteps.logit_mean, "X", "for logit_normal", -1000, 1000);
  tool.flag("logit-std", o.timesteps.logit_std, "X", "for logit_normal", 1e-6, 1000);
  tool.flag("mode-scale", o.timesteps.mode_scale, "X", "for mode", -1000, 1000);
  tool.flag("loss-type", o.loss.type, kLosses, "difference from the velocity");
  tool.flag(
      "huber-schedule", o.loss.huber_schedule, kHuberSchedules, "of huber-c over the noise level");
  tool.flag("huber-c", o.loss.huber_c, "X", "for huber and smooth_l1", 1e-9, 1e9);
  tool.flag("posterior", o.posterior, kPosteriors, "latents: a draw at each visit, or the mean");
  tool.flag("prior-loss-weight", o.prior_loss_weight, "X", "of regularisation images", 0, 1e6);
  tool.group("machine");
  tool.flag("device", o.device, device_choices(), "where to train");
  tool.flag("precision",
            o.precision,
            kPrecisions,
            "of the transformer; auto = bf16 on CUDA, f32 on the CPU");
  tool.flag("reader-threads", o.reader_threads, "N", "threads that read batches ahead", 1, 256);
  tool.flag("rehash", o.rehash, "hash the model anew instead of remembering its hash");
}

void check(const Options& o, const Tool& tool) {
  for (const auto& [name, path] : {std::pair{"latents", &o.latents},
                                   {"text", &o.text},
                                   {"model", &o.model},
                                   {"out", &o.out}}) {
    if (path->empty())
      throw UsageError(fmt::format("--{} is missing", name), "--help has an example");
  }
  if (o.max_steps == 0)
    throw UsageError("--max-steps is missing",
                     "give the number of optimizer updates, 1000 for one");
  if (o.method == Method::kFull)
    throw UsageError("--method full is not there yet", "use --method lora");
  if (o.resume && o.replace)
    throw UsageError("--resume and --replace contradict each other", "give one of them");
  const std::vector<std::tuple<const char*, bool, const char*>> dependent{
      {"sigmoid-scale", uses_scale(o), "--timestep-sampling flux_shift, shift or sigmoid"},
      {"discrete-flow-shift", uses_shift(o), "--timestep-sampling shift or sigma"},
      {"weighting-scheme", uses_density(o), "--timestep-sampling sigma"},
      {"logit-mean", uses_logit(o), "--timestep-sampling sigma --weighting-scheme logit_normal"},
      {"logit-std", uses_logit(o), "--timestep-sampling sigma --weighting-scheme logit_normal"},
      {"mode-scale", uses_mode(o), "--timestep-sampling sigma --weighting-scheme mode"},
      {"huber-schedule", uses_huber(o), "--loss-type huber or smooth_l1"},
      {"huber-c", uses_huber(o), "--loss-type huber or smooth_l1"},
      {"lr-warmup-steps", uses_warmup(o), "--lr-scheduler constant_with_warmup, linear or cosine"}};
  for (const auto& [name, works, needs] : dependent) {
    if (tool.given(name) && !works) {
      throw UsageError(fmt::format("--{} has no effect here", name),
                       fmt::format("it needs {}; or leave it out", needs));
    }
  }
}

nlohmann::json deciding_options(const Options& o) {
  nlohmann::json out{{"method", word(kMethods, o.method)},
                     {"rank", o.rank},
                     {"alpha", o.effective_alpha()},
                     {"learning-rate", o.lr.learning_rate},
                     {"lr-scheduler", word(kSchedules, o.lr.schedule)},
                     {"weight-decay", o.weight_decay},
                     {"max-grad-norm", o.max_grad_norm},
                     {"batch-size", o.batch_size},
                     {"seed", o.seed},
                     {"timestep-sampling", word(kSamplings, o.timesteps.sampling)},
                     {"loss-type", word(kLosses, o.loss.type)},
                     {"posterior", word(kPosteriors, o.posterior)},
                     {"prior-loss-weight", o.prior_loss_weight},
                     {"guidance", o.guidance.value_or(1)}};
  if (uses_warmup(o)) out["lr-warmup-steps"] = o.lr.num_warmup_steps;
  if (needs_num_steps(o)) out["max-steps"] = o.max_steps;
  if (uses_scale(o)) out["sigmoid-scale"] = o.timesteps.sigmoid_scale;
  if (uses_shift(o)) out["discrete-flow-shift"] = o.timesteps.discrete_flow_shift;
  if (uses_density(o)) out["weighting-scheme"] = word(kDensities, o.timesteps.weighting);
  if (uses_logit(o)) {
    out["logit-mean"] = o.timesteps.logit_mean;
    out["logit-std"] = o.timesteps.logit_std;
  }
  if (uses_mode(o)) out["mode-scale"] = o.timesteps.mode_scale;
  if (uses_huber(o)) {
    out["huber-schedule"] = word(kHuberSchedules, o.loss.huber_schedule);
    out["huber-c"] = o.loss.huber_c;
  }
  return out;
}

std::string run_toml(const Options& o) {
  nlohmann::json all = deciding_options(o);
  if (!o.guidance) all.erase("guidance");  // would be refused with a model that has no such input
  all["max-steps"] = o.max_steps;
  all["save-every"] = o.save_every;
  all["lora-dtype"] = word(kSaveDtypes, o.lora_dtype);
  all["precision"] = word(kPrecisions, o.precision);
  all["device"] = word(device_choices(), o.device);
  all["reader-threads"] = o.reader_threads;
  std::string out = "# flux-train --config run.toml\n";
  for (const auto& [name, path] : {std::pair{"latents", &o.latents},
                                   {"text", &o.text},
                                   {"model", &o.model},
                                   {"out", &o.out}}) {
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
