#include "common/engine/trainer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/scalar_tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "common/optim/norm.h"

namespace flux::engine {
namespace {

ModelOptions model_options(const dit::Config& config, const TrainerOptions& o, bool two_phase) {
  return {.compute = o.compute,
          .base = o.base,
          .device = o.device,
          .train_weights = o.full,
          .resident_blocks = o.residency.resident_blocks,
          .kept_graphs = blocks_with_kept_graph(
              config.num_double_blocks + config.num_single_blocks, o.residency, o.shares_weights()),
          .stream_from = o.residency.stream_from,
          .lookahead = o.residency.lookahead,
          .access = o.access,
          .scratch = o.scratch,
          .keep_gradients = o.clip == ClipMode::kGlobal || two_phase,
          .several_micro_batches = o.several_micro_batches || o.ranks.several(),
          .stream_adapters = o.residency.stream_adapters,
          .stream_states = o.residency.stream_states,
          .sharing = o.shares_weights()
                         ? Sharing{o.ranks.shard_world, o.ranks.shard_rank(), o.ranks.gather}
                         : Sharing{}};
}

std::unique_ptr<Optimizer> new_optimizer(const TrainerOptions& o) {
  auto optimizer = make_optimizer(o.optimizer, o.precision);
  const bool whole_tensors = std::holds_alternative<AdafactorOptions>(o.optimizer);
  if (o.shares_weights() && (whole_tensors || optimizer->two_phase() || optimizer->averages()))
    throw std::invalid_argument(
        fmt::format("ranks cannot share weights out with {}", optimizer->name()));
  if (o.ema_decay > 0) optimizer->keep_average({.decay = o.ema_decay}, o.ema_dtype);
  return optimizer;
}

lora::Adapters new_adapters(const std::vector<lora::Target>& targets, const TrainerOptions& o) {
  return o.device.is_meta() ? lora::empty_adapters(targets, o.device, o.form)
                            : lora::make_adapters(targets, o.seed, o.form);
}

void append_values(const at::Tensor& floats, std::vector<double>& out) {
  const at::Tensor values = floats.to(at::kCPU);
  const float* const first = values.const_data_ptr<float>();
  out.insert(out.end(), first, first + values.numel());
}

}  // namespace

std::vector<char> blocks_with_kept_graph(int64_t num_blocks,
                                         const Residency& residency,
                                         bool all_stream) {
  std::vector<char> kept(static_cast<size_t>(num_blocks), 0);
  int64_t resident =
      residency.resident_blocks < 0 ? num_blocks : std::min(residency.resident_blocks, num_blocks);
  if (all_stream) resident = 0;
  int64_t left = residency.kept_graphs;
  for (int64_t block = num_blocks; block-- > 0 && left > 0;) {
    if (block >= resident && block < num_blocks - 1 - residency.lookahead) continue;
    kept[static_cast<size_t>(block)] = 1;
    --left;
  }
  return kept;
}

LoopOptions Trainer::loop_options() const {
  return {.first_trained = model_.first_trained(),
          .keep_graph = blocks_with_kept_graph(
              model_.num_blocks(), options_.residency, options_.shares_weights()),
          .inputs = options_.residency.inputs,
          .scratch = options_.scratch};
}

Trainer::Trainer(const dit::Config& config, std::shared_ptr<ModelFile> file, TrainerOptions options)
    : config_(config),
      options_(std::move(options)),
      optimizer_(new_optimizer(options_)),
      targets_(options_.full ? std::vector<lora::Target>{}
                             : lora::select_targets(
                                   config, options_.selection, options_.rank, options_.alpha)),
      model_(config,
             std::move(file),
             *optimizer_,
             model_options(config, options_, optimizer_->two_phase())),
      // in this order, which braces keep
      loop_{config, with_adapters(), loop_options()},
      exchange_(options_.ranks.several() ? std::optional<GradientExchange>(options_.ranks)
                                         : std::nullopt),
      updater_(model_,
               *optimizer_,
               {.clip = options_.clip,
                .max_norm = options_.max_norm,
                .seed = options_.seed,
                // reading all gradients of a model once more takes its time
                .want_norm = !options_.full,
                .exchange = exchange_ ? &*exchange_ : nullptr,
                .shard_world = options_.ranks.shard_world,
                .shard = options_.ranks.shard,
                .after_update = options_.max_weight_norm > 0
                                    ? std::function<void(std::span<Trainable>)>(
                                          [this](std::span<Trainable> t) { limit_norms(t); })
                                    : nullptr}) {}

ModelBlocks& Trainer::with_adapters() {
  if (options_.full) return model_;
  options_.lr_factors.require_all_used(targets_, "--lr-of");
  options_.dropout.seed = options_.seed;
  model_.train(new_adapters(targets_, options_),
               options_.dropout.any() ? &options_.dropout : nullptr);
  for (const lora::Target& target : targets_) alphas_[target.path] = target.alpha;
  for (int64_t block = -1; block < model_.num_blocks(); ++block)
    for (Trainable& t : block < 0 ? model_.outer_trainables() : model_.trainables(block)) {
      const bool up = t.name.ends_with(".up");
      const std::string path = t.name.substr(0, t.name.rfind('.'));
      t.lr_factor = options_.lr_factors.value(path).value_or(1) * (up ? options_.up_lr_factor : 1);
    }
  return model_;
}

void Trainer::limit_norms(std::span<Trainable> trainables) const {
  for (size_t i = 0; i < trainables.size();) {
    const std::string& name = trainables[i].name;
    const std::string path = name.substr(0, name.rfind('.') + 1);
    lora::Module module{
        path.substr(0, path.size() - 1), {}, {}, alphas_.at(path.substr(0, path.size() - 1))};
    for (; i < trainables.size() && trainables[i].name.starts_with(path); ++i)
      for (size_t part = 0; part < kAdapterParts.size(); ++part)
        if (trainables[i].name == path + kAdapterParts[part])
          *module.parts()[part] = trainables[i].value;
    lora::limit_norm(module, options_.max_weight_norm);
  }
}

lora::Adapters Trainer::adapters(bool averaged) {
  std::map<std::string, at::Tensor> values;
  const at::NoGradGuard no_grad;
  model_.for_all_trainables([&](Trainable& t) {
    const at::Tensor value = t.value.detach();
    const Slot slot{value, {}, t.states, t.id};
    const at::Tensor wanted =
        averaged ? optimizer_->averaged_weights(slot) : optimizer_->evaluation_weights(slot);
    values[t.name] = wanted.cpu();
    // a record's memory is another's soon
    const at::Tensor& kept = averaged ? t.states.back() : value;
    if (options_.residency.stream_adapters && values[t.name].is_alias_of(kept))
      values[t.name] = values[t.name].clone();
    return false;
  });
  lora::Adapters adapters;
  for (const lora::Target& target : targets_) {
    lora::Module module{target.path, {}, {}, target.alpha};
    for (const auto& [part, shape] : lora::part_shapes(target, options_.form))
      *module.parts()[part] = values.at(target.path + "." + kAdapterParts[part]);
    adapters.modules.push_back(std::move(module));
  }
  return adapters;
}

void Trainer::take_evaluation_weights(int64_t block, std::vector<at::Tensor>& trained) {
  if (!optimizer_->averages()) return;
  model_.for_each_trainable(block, [&](Trainable& t) {
    const at::Tensor value = t.value.detach();
    trained.push_back(value.clone());
    value.copy_(optimizer_->evaluation_weights({value, {}, t.states, t.id}));
    return false;
  });
}

void Trainer::give_back(int64_t block, std::vector<at::Tensor>& trained) {
  if (trained.empty()) return;
  const auto trainables = block < 0 ? model_.outer_trainables() : model_.trainables(block);
  for (size_t i = 0; i < trained.size(); ++i) trainables[i].value.detach().copy_(trained[i]);
  trained.clear();
}

/// A forward pass with the weights as they would be saved, without dropout.
std::vector<at::Tensor> Trainer::forward_only(std::span<const MicroBatch> micro_batches) {
  const at::NoGradGuard no_grad;
  updater_.flush();
  struct WithoutDropout {
    AdapterDropout& now;
    AdapterDropout kept = std::exchange(now, {});
    ~WithoutDropout() { now = kept; }
  } const without_dropout{options_.dropout};
  std::vector<at::Tensor> outer, of_block;
  take_evaluation_weights(-1, outer);
  auto results = loop_.forward_only(
      micro_batches,
      {.entered = [&](int64_t block) { take_evaluation_weights(block, of_block); },
       .leaving = [&](int64_t block) { give_back(block, of_block); }});
  give_back(-1, outer);
  return results;
}

std::vector<at::Tensor> Trainer::predict(std::span<const dit::Inputs> inputs) {
  std::vector<MicroBatch> micro_batches;
  for (const dit::Inputs& in : inputs)
    micro_batches.push_back({in, [](const at::Tensor& velocity) { return velocity; }});
  return forward_only(micro_batches);
}

std::vector<double> Trainer::evaluate(std::span<const FlowInputs> batches) {
  LossOptions loss = options_.loss;
  loss.weighting = WeightingScheme::kNone;
  std::vector<MicroBatch> micro_batches;
  for (const FlowInputs& inputs : batches) {
    const FlowStep flow = flow_step(config_, inputs);
    micro_batches.push_back({flow.inputs, [&loss, flow](const at::Tensor& velocity) {
                               return flow_losses(loss, flow, velocity);
                             }});
  }
  std::vector<double> out;
  for (const at::Tensor& part : forward_only(micro_batches)) {
    if (options_.device.is_meta()) {
      out.resize(out.size() + static_cast<size_t>(part.size(0)));
      continue;
    }
    append_values(part, out);
  }
  return out;
}

Trainer::~Trainer() = default;

/// Those of a block, or (-1) of what is outside of blocks; codes of quantised weights are always finite.
void Trainer::show_weights(int64_t block) {
  const std::string prefix = block < 0 ? "" : block_prefix(config_, block);
  dit::Weights weights = model_.weights();  // shares the tensors
  dit::for_each_tensor(weights, [&](const std::string& name, const at::Tensor& tensor) {
    const bool outer = name.find("_blocks.") == std::string::npos;
    if (tensor.defined() && (block < 0 ? outer : name.starts_with(prefix)))
      watch_("weight " + name, tensor.detach());
  });
  if (options_.full) return;
  for (const Trainable& t : block < 0 ? model_.outer_trainables() : model_.trainables(block))
    watch_("weight " + t.name, t.value.detach());
}

LoopHooks Trainer::watched(LoopHooks hooks) {
  const auto before_forward = hooks.before_forward;
  hooks.before_forward = [this, before_forward](int64_t block) {
    const bool changed = before_forward && before_forward(block);
    show_weights(block);
    return changed;
  };
  hooks.after_run = [this](int64_t block, size_t micro_batch, std::span<const at::Tensor> values) {
    const bool last = block == model_.num_blocks();
    std::string where = block < 0 ? "before the blocks" : last ? "" : block_prefix(config_, block);
    if (where.ends_with('.')) where = "after " + where.substr(0, where.size() - 1);
    constexpr std::array<const char*, 3> kNames{"img", "txt", "vec"};
    for (size_t i = 0; i < values.size(); ++i)
      watch_(fmt::format("{}{}{}, micro-batch {}",
                         last                 ? "velocity"
                         : values.size() == 1 ? "x"
                                              : kNames[i],
                         last ? "" : " ",
                         where,
                         micro_batch),
             values[i]);
  };
  hooks.ready = [this, ready = hooks.ready](int64_t block, std::span<Trainable> trainables) {
    for (const Trainable& t : trainables) {
      if (!t.gradient.defined()) continue;
      watch_("gradient of " + t.name, t.gradient);
      // squares may be too large where the numbers are not
      watch_("norm of the gradient of " + t.name,
             at::scalar_tensor(std::sqrt(sum_of_squares(t.gradient)), at::kDouble));
    }
    return ready(block, trainables);
  };
  return hooks;
}

/// What a step reports, from every rank's micro-batches.
void Trainer::gather_losses(std::span<const at::Tensor> losses,
                            std::span<const at::Tensor> by_sample,
                            std::span<const int64_t> batch_sizes,
                            TrainResult& result) const {
  const Ranks& ranks = options_.ranks;
  // of each micro-batch a row: its loss, and those of its samples
  const auto num_own = static_cast<int64_t>(losses.size());
  const int64_t width = 1 + *std::ranges::max_element(batch_sizes);
  std::vector<double> own(static_cast<size_t>(num_own * width));
  for (int64_t m = 0; m < num_own; ++m) {
    std::vector<double> row{losses[static_cast<size_t>(m)].item<double>()};
    append_values(by_sample[static_cast<size_t>(m)], row);
    std::ranges::copy(row, own.begin() + m * width);
  }
  std::vector<double> all(own.size() * static_cast<size_t>(ranks.world));
  const at::Tensor mine = at::from_blob(own.data(), {num_own * width}, at::kDouble);
  const at::Tensor gathered =
      at::from_blob(all.data(), {static_cast<int64_t>(all.size())}, at::kDouble);
  if (ranks.group)
    ranks.group->all_gather(gathered, mine);
  else
    gathered.copy_(mine);
  for (size_t j = 0; j < batch_sizes.size(); ++j) {
    const int64_t rank = static_cast<int64_t>(j) % ranks.world,
                  m = static_cast<int64_t>(j) / ranks.world;
    const double* const row = all.data() + (rank * num_own + m) * width;
    result.loss += row[0];
    result.sample_losses.insert(result.sample_losses.end(), row + 1, row + 1 + batch_sizes[j]);
  }
}

TrainResult Trainer::step(std::span<const FlowInputs> micro_batches,
                          int64_t step,
                          double learning_rate,
                          std::span<const int64_t> batch_sizes) {
  std::vector<int64_t> own_sizes;
  for (const FlowInputs& inputs : micro_batches) own_sizes.push_back(inputs.latents.size(0));
  const int64_t world = batch_sizes.empty() ? 1 : options_.ranks.world;
  const int64_t rank = world > 1 ? options_.ranks.rank : 0;
  if (batch_sizes.empty()) batch_sizes = own_sizes;
  std::vector<uint64_t> first_samples;  // of each micro-batch in the step
  int64_t num_samples = 0;
  for (size_t j = 0; j < batch_sizes.size(); ++j) {
    if (static_cast<int64_t>(j) % world == rank)
      first_samples.push_back(static_cast<uint64_t>(num_samples));
    num_samples += batch_sizes[j];
  }
  std::vector<MicroBatch> batches;
  std::vector<at::Tensor> by_sample;
  for (const FlowInputs& inputs : micro_batches) {
    const double share =
        static_cast<double>(inputs.latents.size(0)) / static_cast<double>(num_samples);
    const FlowStep flow = flow_step(config_, inputs);
    batches.push_back({flow.inputs, [this, &by_sample, flow, share](const at::Tensor& velocity) {
                         const auto losses = flow_losses(options_.loss, flow, velocity);
                         by_sample.push_back(losses.detach());
                         const auto loss = losses.mean();
                         return share == 1 ? loss : loss * share;
                       }});
  }
  TrainResult result;
  updater_.begin(step, learning_rate);
  LoopHooks hooks = updater_.hooks();
  hooks.before_run = [&](size_t micro_batch) {
    options_.dropout.pass = static_cast<uint64_t>(step);
    options_.dropout.sample = first_samples[micro_batch];
  };
  hooks.after_forward = [&](std::span<const at::Tensor> losses) {
    if (options_.device.is_meta()) return;
    gather_losses(losses, by_sample, batch_sizes, result);
    if (!std::isfinite(result.loss)) throw NotFinite("the loss");
  };
  try {
    if (watch_) {
      show_weights(-1);
      hooks = watched(std::move(hooks));
    }
    loop_.step(batches, hooks);
    result.grad_norm = updater_.finish();
  } catch (NotFinite& reason) {
    updater_.abandon();
    reason.loss = result.loss;
    throw;
  } catch (...) {
    updater_.abandon();
    throw;
  }
  return result;
}

}  // namespace flux::engine
