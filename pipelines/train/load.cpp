#include "pipelines/train/load.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros_like.h>
#include <fmt/format.h>

#include <string>
#include <utility>
#include <vector>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/core/tool.h"

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

std::vector<Parameter> make_parameters(lora::Adapters& adapters, c10::Device device) {
  std::vector<Parameter> parameters;
  for (lora::Module& module : adapters.modules) {
    for (auto& [name, tensor] :
         {std::pair<const char*, at::Tensor&>{"down", module.down}, {"up", module.up}}) {
      tensor = tensor.to(device).requires_grad_(true);
      parameters.push_back(
          {module.path + "." + name, tensor, at::zeros_like(tensor), at::zeros_like(tensor)});
    }
  }
  return parameters;
}

// Threads that wait for each other at the end of every small operation cost more than they save: a
// model of 7 M parameters has its first loss 1.5 empty LibTorch starts after its own with one
// thread, and 3 to 6 with two while other programs are busy.
void limit_threads(const dit::Config& config) {
  constexpr int64_t kSmallModel = 50'000'000;
  if (config.num_parameters() < kSmallModel) at::set_num_threads(1);
}

}  // namespace

std::string precision_word(at::ScalarType compute) {
  return compute == at::kFloat ? "f32" : "bf16";
}

Session open_data(const Options& options) {
  Session session;
  session.options = options;
  session.device = resolve_device(options.device);
  const bool bf16 = options.precision == Precision::kBF16 ||
                    (options.precision == Precision::kAuto && !session.device.is_cpu());
  session.compute = bf16 ? at::kBFloat16 : at::kFloat;
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
                  .sample_posterior = options.posterior == Posterior::kSample,
                  .prior_loss_weight = options.prior_loss_weight});
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
  cancel::check();
  return session;
}

void load_model(Session& session) {
  const Options& options = session.options;
  NetTensors net = take_net(read_weights(options.model), NetKind::kFlux);
  dit::Model& model = session.model;
  model.config = dit::read_config(net);
  check_fit(options, *session.data, model.config);
  limit_threads(model.config);
  model.canonical = dit::canonical_tensors(net, model.config);
  model.stamps = std::move(net.stamps);
  model.weights = dit::make_weights(model.config, model.canonical, session.compute, session.device);
  session.adapters = lora::make_adapters(lora::default_targets(model.config),
                                         options.rank,
                                         options.effective_alpha(),
                                         static_cast<uint64_t>(options.seed));
  session.parameters = make_parameters(session.adapters, session.device);
  lora::attach(session.adapters, model.weights);
  log::info("{}; LoRA of rank {}, {} modules, {} parameters",
            model.config.describe(),
            options.rank,
            session.adapters.modules.size(),
            session.adapters.num_parameters());
  cancel::check();
}

void start_hashing(Session& session) {
  // the task holds the tensors, so that joined copies go when it is done
  auto task = [stamps = session.model.stamps,
               tensors = std::exchange(session.model.canonical, {}),
               rehash = session.options.rehash]() mutable {
    const auto digest = remembered_weights_sha256(stamps, "flux", tensors, rehash);
    tensors.clear();
    return to_hex(digest);
  };
  session.model_sha256 = std::async(std::launch::async, std::move(task)).share();
}

}  // namespace flux::train
