#include "pipelines/train/reproduce.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/core/version.h"
#include "common/engine/budget.h"
#include "common/tensor/device.h"
#include "common/tensor/memory.h"
#include "common/tensor/tensor.h"
#include "common/tensor/weight_file.h"
#include "formats/checkpoint/checkpoint.h"
#include "pipelines/train/dump.h"
#include "pipelines/train/load.h"
#include "pipelines/train/plan.h"
#include "pipelines/train/save.h"

namespace flux::train {
namespace {

constexpr char kKey[] = "flux_stages.step";
constexpr char kAdapters[] = "lora.";

/// By the names in a dump.
template <class Inputs, class Visit>
void for_each_input(Inputs& inputs, const Visit& visit) {
  visit("latents", inputs.latents);
  visit("noise", inputs.noise);
  visit("input_noise", inputs.input_noise);
  visit("sigma", inputs.sigma);
  visit("prompt_embedding", inputs.prompt_embedding);
  visit("pooled_embedding", inputs.pooled_embedding);
  visit("text_mask", inputs.text_mask);
  visit("loss_mask", inputs.loss_mask);
  visit("loss_weight", inputs.loss_weight);
}

/// A NaN has a sign that means nothing.
std::string number_text(double value) {
  return std::isnan(value) ? "nan" : fmt::format("{:.17g}", value);
}

/// "adapters": in the dump; "model": those of --model; "step-000012": of that checkpoint; "gone".
std::string where_weights_are(const Session& session) {
  if (!session.trainer->step_is_whole()) return "gone";
  if (session.options.method == Method::kLora) return "adapters";
  return session.step == 0 ? "model" : checkpoint::step_name(session.step);
}

nlohmann::json samples_of(std::span<const Batch> batches, std::span<const FlowInputs> inputs) {
  nlohmann::json out = nlohmann::json::array();
  for (size_t i = 0; i < batches.size(); ++i) {
    const at::Tensor sigma = inputs[i].sigma.cpu();
    for (size_t row = 0; row < batches[i].names.size(); ++row)
      out.push_back({{"micro_batch", i},
                     {"name", printable(batches[i].names[row])},
                     {"epoch", batches[i].epoch},
                     {"key", fmt::format("{:016x}", batches[i].visits[row])},
                     {"sigma", sigma[static_cast<int64_t>(row)].item<float>()}});
  }
  return out;
}

struct Dump {
  WeightFile file;
  nlohmann::json about;
  std::vector<FlowInputs> inputs;
};

Dump read_dump(const std::filesystem::path& path) {
  Dump dump{read_weights(path), {}, {}};
  const auto found = dump.file.metadata.find(kKey);
  const auto refuse = [&] {
    throw InputError(fmt::format("{}: is no dump of a step", show(path)),
                     "give a not-finite-*.safetensors of a run folder");
  };
  if (found == dump.file.metadata.end()) refuse();
  dump.about = nlohmann::json::parse(found->second, nullptr, /*allow_exceptions=*/false);
  if (!dump.about.is_object()) refuse();
  try {
    for (size_t i = 0; i < dump.about.at("micro_batches").get<size_t>(); ++i) {
      FlowInputs inputs;
      for_each_input(inputs, [&](const char* name, at::Tensor& tensor) {
        const auto at = dump.file.tensors.find(fmt::format("{}.{}", i, name));
        if (at != dump.file.tensors.end()) tensor = at->second;
      });
      const auto is = [&](const at::Tensor& tensor, int64_t dim) {
        return tensor.defined() && tensor.dim() == dim &&
               tensor.size(0) == inputs.latents.size(0) && tensor.numel() > 0;
      };
      const auto may_be = [&](const at::Tensor& tensor, int64_t dim) {
        return !tensor.defined() || is(tensor, dim);
      };
      if (!inputs.latents.defined() || inputs.latents.dim() != 4 || !is(inputs.noise, 4) ||
          inputs.noise.sizes() != inputs.latents.sizes() || !is(inputs.sigma, 1) ||
          !is(inputs.prompt_embedding, 3) || !is(inputs.pooled_embedding, 2) ||
          !may_be(inputs.input_noise, 4) || !may_be(inputs.text_mask, 2) ||
          !may_be(inputs.loss_mask, 4) || !may_be(inputs.loss_weight, 1))
        refuse();
      inputs.guidance = dump.about.at("guidance");
      // which safetensors keeps as bytes
      if (inputs.text_mask.defined()) inputs.text_mask = inputs.text_mask.to(at::kBool);
      dump.inputs.push_back(std::move(inputs));
    }
    for (const char* key : {"reason", "loss", "weights", "model_sha256", "precision"})
      dump.about.at(key).get<std::string>();
    for (const auto& sample : dump.about.at("samples")) sample.at("name").get<std::string>();
    dump.about.at("step").get<int64_t>();
    dump.about.at("learning_rate").get<double>();
    dump.about.at("options").items();
  } catch (const nlohmann::json::exception&) {
    refuse();
  }
  return dump;
}

void require_same_options(const Options& options, const Dump& dump, at::ScalarType compute) {
  nlohmann::json now = deciding_options(options), then = dump.about["options"];
  now["precision"] = precision_word(compute);
  then["precision"] = dump.about["precision"];
  std::set<std::string> names;
  for (const auto* side : {&now, &then})
    for (const auto& [name, value] : side->items()) names.insert(name);
  for (const std::string& name : names) {
    const auto a = now.value(name, nlohmann::json()), b = then.value(name, nlohmann::json());
    if (a == b) continue;
    throw CacheError(fmt::format("--{} is {}, the run of {} had {}",
                                 printable(name),
                                 printable(a.dump()),
                                 show(dump.file.path),
                                 printable(b.dump())),
                     "give --config with the run.toml of that run's folder");
  }
}

engine::StepShape shape_of(const Dump& dump) {
  engine::StepShape shape;
  shape.micro_batches = std::ssize(dump.inputs);
  shape.batch = 0;
  for (const FlowInputs& in : dump.inputs) {
    shape.batch = std::max(shape.batch, in.latents.size(0));
    shape.height = std::max(shape.height, 8 * in.latents.size(2));
    shape.width = std::max(shape.width, 8 * in.latents.size(3));
    shape.text_length = std::max<int64_t>(shape.text_length, in.prompt_embedding.size(1));
    shape.text_mask = shape.text_mask || in.text_mask.defined();
    shape.loss_mask = shape.loss_mask || in.loss_mask.defined();
    shape.input_noise = shape.input_noise || in.input_noise.defined();
    shape.text_type = in.prompt_embedding.scalar_type();
  }
  return shape;
}

/// Where the first number that is not finite is.
class Finder {
 public:
  void look(const std::string& name, const at::Tensor& value) {
    if (!first_.empty() || !value.defined() || !at::isFloatingType(value.scalar_type())) return;
    // 8-bit types have no isfinite()
    const at::Tensor values =
        (value.element_size() == 1 ? value.to(at::kFloat) : value).detach().contiguous();
    const at::Tensor finite = values.isfinite().flatten();
    const int64_t bad = finite.numel() - finite.sum().item<int64_t>();
    if (bad == 0) return;
    const int64_t at = finite.logical_not().nonzero()[0][0].item<int64_t>();
    first_ = fmt::format("{}: {} of {} numbers, the first is {} at {}",
                         name,
                         bad,
                         values.numel(),
                         number_text(values.flatten()[at].item<double>()),
                         at);
  }
  std::string first() const { return first_; }

 private:
  std::string first_;
};

void look_at_inputs(const Dump& dump, Finder& finder) {
  std::vector<std::string> names;
  for (const auto& sample : dump.about["samples"])
    names.push_back(sample["name"].get<std::string>());
  size_t number = 0;
  for (const FlowInputs& in : dump.inputs) {
    for_each_input(in, [&](const char* name, const at::Tensor& tensor) {
      for (int64_t row = 0; tensor.defined() && row < tensor.size(0); ++row) {
        const size_t sample = number + static_cast<size_t>(row);
        finder.look(
            fmt::format("{} of {}", name, sample < names.size() ? names[sample] : "a sample"),
            tensor[row]);
      }
    });
    number += static_cast<size_t>(in.latents.size(0));
  }
}

/// Puts what the dump or a checkpoint holds under `prefix` into what is trained.
void set_weights(engine::Trainer& trainer, const WeightFile& from, const std::string& prefix) {
  const at::NoGradGuard no_grad;
  trainer.model().for_all_trainables([&](engine::Trainable& t) {
    const auto found = from.tensors.find(prefix + t.name);
    if (found == from.tensors.end() || found->second.sizes() != t.value.sizes())
      throw CacheError(fmt::format(
          "{}: no tensor {}{} of {}", show(from.path), prefix, t.name, shape_text(t.value)));
    t.value.detach().copy_(found->second);
    return true;
  });
}

}  // namespace

std::filesystem::path dump_step(Session& session,
                                std::span<const Batch> batches,
                                std::span<const FlowInputs> inputs,
                                const engine::NotFinite& reason) {
  const Options& o = session.options;
  TensorMap tensors;
  for (size_t i = 0; i < inputs.size(); ++i)
    for_each_input(inputs[i], [&](const char* name, const at::Tensor& tensor) {
      if (!tensor.defined()) return;
      const bool mask = tensor.scalar_type() == at::kBool;
      tensors[fmt::format("{}.{}", i, name)] = (mask ? tensor.to(at::kByte) : tensor).cpu();
    });
  const std::string weights = where_weights_are(session);
  if (weights == "adapters")
    session.trainer->model().for_all_trainables([&](engine::Trainable& t) {
      // a record's memory is another's soon
      tensors[kAdapters + t.name] = t.value.detach().cpu().clone();
      return false;
    });
  const nlohmann::json about{{"step", session.step + 1},
                             {"learning_rate", learning_rate(o.effective_lr(), session.step)},
                             {"reason", reason.what()},
                             {"loss", number_text(reason.loss)},
                             {"options", deciding_options(o)},
                             {"precision", precision_word(session.compute)},
                             {"device", session.device.str()},
                             {"seed", o.seed},
                             {"guidance", session.guidance()},
                             {"micro_batches", inputs.size()},
                             {"samples", samples_of(batches, inputs)},
                             {"model_sha256", session.model_sha256.get()},
                             {"weights", weights},
                             {"commit", commit()}};
  const auto path = o.out / fmt::format("not-finite-{:06}.safetensors", session.step + 1);
  write_weights(path, tensors, {{kKey, about.dump()}});
  return path;
}

Reproduction reproduce(const Options& options) {
  count_tensor_memory();
  const Dump dump = read_dump(options.reproduce);
  const at::Device device = resolve_device(options.device);
  const at::ScalarType compute = compute_type(options, device);
  require_same_options(options, dump, compute);
  Reproduction out{.step = dump.about["step"],
                   .reason = dump.about["reason"],
                   .loss = dump.about["loss"],
                   .reason_now = {},
                   .loss_now = {},
                   .first = {}};
  const std::string where = dump.about["weights"];
  if (where == "gone")
    throw CacheError(
        fmt::format(
            "{}: step {} had updated some blocks when it failed, so that the weights before "
            "it are gone",
            show(options.reproduce),
            out.step),
        "--resume goes on from the last checkpoint and comes to the same step");
  const bool of_model = where == "model" || where == "adapters";
  const auto checkpoint = std::filesystem::absolute(options.reproduce).parent_path() / where;
  engine::TrainerOptions wanted = trainer_options(options, device, compute);
  const engine::ModelFileOptions read{.dtype = compute, .quant = wanted.base};
  const auto file =
      std::make_shared<engine::ModelFile>(of_model ? options.model : weights_in(checkpoint), read);
  const std::string hash =
      to_hex(of_model ? file->weights_sha256(options.rehash)
                      : engine::ModelFile(options.model).weights_sha256(options.rehash));
  if (hash != dump.about["model_sha256"])
    throw CacheError(fmt::format("{} (weights_sha256) is {}, the run of {} had {}",
                                 show(options.model),
                                 hash,
                                 show(options.reproduce),
                                 printable(dump.about["model_sha256"].get<std::string>())),
                     "give the --model that it was run with");
  engine::limit_threads(file->config());
  wanted.base = file->quant();
  wanted.several_micro_batches = dump.inputs.size() > 1;
  const auto choice = choose(options, file->config(), file.get(), wanted, shape_of(dump));
  require_fit(options, choice);
  wanted.residency = choice.residency;
  engine::Trainer trainer(file->config(), file, wanted);
  if (where == "adapters") set_weights(trainer, dump.file, kAdapters);
  // the saved model of an optimizer that averages is the average
  if (!of_model && trainer.optimizer().averages())
    set_weights(trainer, read_weights(checkpoint / "state.safetensors"), "weight.");

  Finder finder;
  look_at_inputs(dump, finder);
  trainer.watch(
      [&](const std::string& name, const at::Tensor& value) { finder.look(name, value); });
  std::vector<FlowInputs> inputs = dump.inputs;
  for (FlowInputs& in : inputs)
    for_each_input(in, [&](const char*, at::Tensor& tensor) {
      if (tensor.defined()) tensor = tensor.to(device);
    });
  try {
    const auto result = trainer.step(inputs, out.step, dump.about["learning_rate"]);
    out.loss_now = number_text(result.loss);
  } catch (const engine::NotFinite& reason) {
    out.reason_now = reason.what();
    out.loss_now = number_text(reason.loss);
  }
  out.first = finder.first();
  // a loss can overflow all of whose terms are finite
  if (out.first.empty() && !out.reason_now.empty()) out.first = out.reason_now;
  log::info("{}: step {}, {}, on {}",
            show(options.reproduce),
            out.step,
            printable(out.reason),
            printable(dump.about["samples"].dump()));
  return out;
}

std::string Reproduction::line() const {
  return fmt::format("step={} loss={} {}; first: {}",
                     step,
                     loss_now,
                     same() ? "as in the run" : fmt::format("but {} in the run", printable(loss)),
                     first.empty() ? "none, all is finite" : printable(first));
}

nlohmann::json Reproduction::object() const {
  return {{"step", step},
          {"reproduced", same()},
          {"reason", reason_now},
          {"loss", loss_now},
          {"reason_of_run", reason},
          {"loss_of_run", loss},
          {"first", first}};
}

}  // namespace flux::train
