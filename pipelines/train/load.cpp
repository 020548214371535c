#include "pipelines/train/load.h"

#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/engine/budget.h"
#include "common/ops/attention.h"
#include "pipelines/train/lora_options.h"
#include "pipelines/train/optimizer.h"
#include "pipelines/train/plan.h"
#include "pipelines/train/ranks.h"
#include "pipelines/train/samples.h"
#include "pipelines/train/tags.h"
#include "pipelines/train/validate.h"

namespace flux::train {
namespace {

/// The fields in which a cache and the model do not fit.
class Misfits {
 public:
  explicit Misfits(const std::filesystem::path& model) : model_(show(model)) {}
  void require(const std::filesystem::path& cache,
               const char* field,
               int64_t found,
               int64_t wanted,
               const char* hint) {
    if (found == wanted) return;
    if (lines_.empty()) hint_ = hint;
    lines_.push_back(fmt::format("{}: parameters.{} is {}, the model {} takes {}",
                                 show(cache),
                                 field,
                                 found,
                                 model_,
                                 wanted));
  }
  /// Throws CacheError naming all of them, with the hint of the first.
  void refuse() const {
    if (!lines_.empty()) throw CacheError(fmt::format("{}", fmt::join(lines_, "\n  ")), hint_);
  }

 private:
  std::string model_, hint_;
  std::vector<std::string> lines_;
};

void check_fit(const Options& options, const TrainingData& data, const dit::Config& config) {
  const auto text = cache::layout_of(cache::Kind::kText, data.text_manifest().recipe.parameters);
  constexpr char kHint[] = "make the text cache with the encoders that belong to this model";
  Misfits misfits(options.model);
  misfits.require(options.text, "t5_width", text.t5_width, config.prompt_dim, kHint);
  misfits.require(options.text, "clip_width", text.clip_width, config.pooled_dim, kHint);
  if (config.guidance) {
    misfits.require(options.text,
                    "t5_length",
                    text.t5_length,
                    512,
                    "run flux-cache-text with --t5-length 512; only schnell was trained with 256");
  } else if (text.t5_length != 256) {
    misfits.require(options.text,
                    "t5_length",
                    text.t5_length,
                    512,
                    "run flux-cache-text with --t5-length 512 or 256");
  }
  constexpr int64_t kPatch = 4;  // a token is a patch of 2 x 2 latents
  const auto latents =
      cache::layout_of(cache::Kind::kLatents, data.latents_manifest().recipe.parameters);
  const bool posterior =
      data.latents_manifest().recipe.parameters.value("store", "") == "mean_logvar";
  misfits.require(options.latents,
                  "channels",
                  latents.channels,
                  config.in_channels / kPatch * (posterior ? 2 : 1),
                  "FLUX.1 dev and schnell take 16 latent channels");
  misfits.refuse();
  if (options.posterior != Posterior::kSample && !posterior) {
    throw UsageError(fmt::format("--posterior has no effect: {} holds one sample of each posterior",
                                 show(options.latents)),
                     "leave it out, or cache the latents with --store mean_logvar");
  }
  if ((options.masked_loss == MaskedLoss::kOn ||
       options.masked_loss == MaskedLoss::kRenormalised) &&
      !data.has_loss_masks()) {
    throw UsageError(
        fmt::format("--masked-loss has no effect: {} holds no masks", show(options.latents)),
        "cache the latents of subsets with alpha_mask = true or conditioning_data_dir, or leave it "
        "out");
  }
  if (options.prior_loss_weight != 1 && data.num_regularization() == 0) {
    throw UsageError("--prior-loss-weight has no effect: the data set has no regularisation images",
                     "leave it out");
  }
  if (options.guidance && !config.guidance) {
    throw UsageError(
        fmt::format("--guidance has no effect: {} has no guidance input", show(options.model)),
        "leave it out");
  }
}

void check_held_out(const Session& session) {
  const Options& o = session.options;
  if (session.data->num_validation() > 0) {
    if (validates(session))
      log::info("validation: {} samples at {} noise levels at every checkpoint",
                session.data->num_held_out(),
                o.effective_validation_sigmas().size());
    return;
  }
  if (o.validation_split > 0)
    throw UsageError(fmt::format("--validation-split {} has no effect: all samples are for "
                                 "regularisation, which are not held out",
                                 o.validation_split),
                     "leave it out");
  for (const auto& [name, given] : {std::pair{"validate-every", o.validate_every.any()},
                                    {"validation-samples", o.validation_samples.has_value()},
                                    {"validation-sigmas", !o.validation_sigmas.empty()},
                                    {"validation-seed", o.validation_seed.has_value()}})
    if (given)
      throw UsageError(fmt::format("--{} has no effect: no samples are held out", name),
                       "give --validation-split 0.1, or validation_split in the data set file");
}

engine::StepShape step_shape(const Session& session) {
  const TrainingData& data = *session.data;
  engine::StepShape shape;
  auto buckets = data.buckets();
  if (validates(session)) {
    const auto held_out = data.held_out_buckets();
    buckets.insert(buckets.end(), held_out.begin(), held_out.end());
  }
  for (const auto& [width, height, visits] : buckets) {
    if (width * height <= shape.width * shape.height) continue;
    shape.width = width;
    shape.height = height;
  }
  shape.batch = data.largest_batch();
  shape.micro_batches = session.options.gradient_accumulation;
  // those on their way to a GPU are in host memory, and few
  if (session.device.is_cpu()) shape.batches_ahead = session.options.prefetch;
  shape.text_length = data.longest_text();
  shape.text_mask = data.has_text_mask();
  shape.loss_mask = data.has_loss_masks();
  shape.input_noise = session.options.ip_noise_gamma > 0;
  shape.text_type = data.text_manifest().recipe.parameters.value("dtype", "") == "f32"
                        ? at::kFloat
                        : at::kBFloat16;
  shape.sample = sample_shape(session);
  return shape;
}

}  // namespace

at::ScalarType compute_type(const Options& options, at::Device device) {
  const bool bf16 = options.precision == Precision::kBF16 ||
                    (options.precision == Precision::kAuto && !device.is_cpu());
  return bf16 ? at::kBFloat16 : at::kFloat;
}

std::string precision_word(at::ScalarType compute) {
  return compute == at::kFloat ? "f32" : "bf16";
}

std::string attention_word(const Session& session) {
  const auto q = at::empty({0}, at::TensorOptions(session.device).dtype(session.compute));
  return std::string(attention_backend(q, session.data->has_text_mask()));
}

engine::TrainerOptions trainer_options(const Options& o,
                                       at::Device device,
                                       at::ScalarType compute) {
  engine::TrainerOptions t;
  t.device = device;
  t.compute = compute;
  t.full = o.method == Method::kFull;
  if (o.base == BasePrecision::kFp8) t.base = QuantFormat::kFp8;
  if (o.base == BasePrecision::kNf4) t.base = QuantFormat::kNf4;
  set_lora(o, t);
  t.seed = static_cast<uint64_t>(o.seed);
  t.optimizer = optimizer_options(o);
  t.precision = optimizer_precision(o);
  t.ema_decay = o.ema_decay;
  t.ema_dtype = o.ema_dtype == StateDtype::kF32 ? at::kFloat : at::kBFloat16;
  t.clip = o.effective_clip();
  t.max_norm = o.max_grad_norm;
  t.loss = o.loss;
  t.loss.weighting = o.timesteps.weighting;
  t.loss.renormalise_mask = o.masked_loss == MaskedLoss::kRenormalised;
  t.several_micro_batches = o.gradient_accumulation > 1;
  t.ranks.world = o.launch.world;
  t.ranks.rank = o.launch.rank;
  t.ranks.exact = o.exact_reduction;
  t.ranks.shard_world = o.shard_world();
  t.scratch = o.scratch.empty() ? o.out : o.scratch;
  engine::Residency& r = t.residency;
  r.resident_blocks = o.resident_blocks.value_or(-1);
  r.kept_graphs = o.kept_graphs.value_or(0);
  r.lookahead = o.ring_slots.value_or(2) - 1;
  r.stream_adapters = o.stream_adapters;
  r.stream_states = o.stream_states;
  r.inputs = o.block_inputs.value_or(engine::InputPlace::kDevice);
  r.stream_from = o.stream_from.value_or(device.is_cuda() ? engine::StreamFrom::kHost
                                                          : engine::StreamFrom::kFile);
  return t;
}

GroupParts join_parts(dist::Group& group, engine::Ranks& ranks) {
  ranks.group = &group;
  GroupParts parts;
  if (!ranks.sharded()) return parts;
  const auto join = [&](const char* name, int64_t first, int64_t stride, int64_t count) {
    std::vector<int64_t> members;
    for (int64_t i = 0; i < count; ++i) members.push_back(first + i * stride);
    parts.push_back(group.part(fmt::format("{} {}", name, first), members));
    return parts.back().get();
  };
  const int64_t first = ranks.rank - ranks.shard_rank();
  ranks.shard = join("gradients", first, 1, ranks.shard_world);
  ranks.gather = join("weights", first, 1, ranks.shard_world);
  if (ranks.num_replicas() > 1)
    ranks.replica = join("copies", ranks.shard_rank(), ranks.shard_world, ranks.num_replicas());
  return parts;
}

Session open_data(const Options& options) {
  Session session;
  session.options = options;
  const dist::Launch& launch = options.launch;
  session.device = resolve_device(
      options.device,
      launch.own_gpus ? LocalProcess{}
                      : LocalProcess{.number = launch.local_rank, .num = launch.local_world});
  if (launch.several() && session.device.is_cuda()) dist::require_nccl();
  session.compute = compute_type(options, session.device);
  log::info("version {} device={} precision={} command: {}",
            tool_version(),
            session.device.str(),
            precision_word(session.compute),
            options.command_line);

  session.data = std::make_unique<TrainingData>(
      options.latents,
      options.text,
      DataOptions{.seed = static_cast<uint64_t>(options.seed),
                  .batch_size = options.batch_size,
                  .accumulation = options.batches_a_step(),
                  .sample_posterior = options.posterior == Posterior::kSample,
                  .prior_loss_weight = options.prior_loss_weight,
                  .text_mask = options.text_mask == TextMask::kAsCached
                                   ? std::nullopt
                                   : std::optional(options.text_mask == TextMask::kOn),
                  .loss_masks = options.masked_loss != MaskedLoss::kOff,
                  .input_noise = options.ip_noise_gamma,
                  .random_input_noise = options.ip_noise_gamma_random_strength,
                  .validation_split = options.validation_split,
                  .validation_seed = static_cast<uint64_t>(options.validation_seed.value_or(0)),
                  .validation_samples = options.validation_samples.value_or(0)});
  const TrainingData& data = *session.data;
  log::info(
      "{} items, {} visits in {} batches an epoch, {} buckets{}{}{}",
      data.num_items(),
      data.num_visits(),
      data.num_batches(),
      data.buckets().size(),
      data.num_quarantined()
          ? fmt::format(", {} quarantined items left out", data.num_quarantined())
          : "",
      data.num_validation() ? fmt::format(", {} held out for validation", data.num_validation())
                            : "",
      data.num_regularization() ? fmt::format(", {} for regularisation", data.num_regularization())
                                : "");
  check_held_out(session);
  set_steps(session.options, data.num_batches());
  if (options.max_epochs > 0)
    log::info("--max-epochs {}: {} steps", options.max_epochs, session.options.max_steps);
  cancel::check();
  return session;
}

void require_trainable(const Options& options, const engine::ModelFile& file) {
  if (options.method == Method::kFull && file.quant())
    throw UsageError(fmt::format("--method full cannot train {}, whose weights are quantised",
                                 show(file.path())),
                     "give the plain weights");
}

void open_model(Session& session, const std::filesystem::path& weights) {
  const Options& options = session.options;
  engine::TrainerOptions wanted = trainer_options(options, session.device, session.compute);
  engine::ModelFileOptions read;
  read.dtype = session.compute;
  read.quant = wanted.base;
  session.file = std::make_shared<engine::ModelFile>(weights, read);
  require_trainable(options, *session.file);
  session.config = session.file->config();
  check_fit(options, *session.data, session.config);
  open_samples(session);
  engine::limit_threads(session.config);
  cancel::check();
}

void load_model(Session& session) {
  const Options& options = session.options;
  engine::TrainerOptions wanted = trainer_options(options, session.device, session.compute);
  wanted.base = session.file->quant();
  const auto choice =
      choose(options, session.config, session.file.get(), wanted, step_shape(session));
  require_fit(options, choice);
  session.plan = choice.plan;
  log::info("attention: {}", attention_word(session));
  log::info("plan: {}", choice.describe());
  wanted.residency = choice.residency;
  // a block whose graph is kept is not gathered again: all ranks that share it gather alike, whatever fits each
  if (wanted.shares_weights())
    for (const auto& its : gather_numbers(session, {wanted.residency.kept_graphs}))
      wanted.residency.kept_graphs = std::min(wanted.residency.kept_graphs, its[0]);
  if (session.group) session.parts = join_parts(*session.group, wanted.ranks);
  if (validates(session)) plan_validation(session, wanted, step_shape(session));
  session.trainer = std::make_unique<engine::Trainer>(session.config, session.file, wanted);
  if (wanted.full)
    log::info("{}; all {} parameters are trained",
              session.config.describe(),
              session.config.num_parameters());
  else
    log::info("{}; LoRA of {}, {} modules, {} parameters",
              session.config.describe(),
              lora::ranks_text(session.trainer->targets()),
              session.trainer->targets().size(),
              lora::num_parameters(session.trainer->targets(), session.trainer->options().form));
  if (const auto rates = group_learning_rates(options, options.lr.learning_rate); !rates.empty())
    log::info("learning rates: {}", printable(nlohmann::json(rates).dump()));
  cancel::check();
}

void start_hashing(Session& session) {
  // a resumed run begins with other weights than those it is known by
  auto task =
      [file = session.file, model = session.options.model, rehash = session.options.rehash] {
        if (file->path() == model) return to_hex(file->weights_sha256(rehash));
        return to_hex(engine::ModelFile(model).weights_sha256(rehash));
      };
  session.model_sha256 = std::async(std::launch::async, std::move(task)).share();
}

void start_reading_captions(Session& session) {
  auto task = [text = session.options.text, subsets = session.data->subsets()] {
    std::map<std::string, std::string> out;
    try {
      out = dataset_metadata(text, subsets);
    } catch (const Error& error) {
      log::warn("the saved LoRA will hold no tags: {}", error.what());
    }
    return out;
  };
  session.dataset_metadata = std::async(std::launch::async, std::move(task)).share();
}

}  // namespace flux::train
