#include "pipelines/train/save.h"

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "common/core/disk.h"
#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/core/version.h"
#include "common/models/flux/layout.h"
#include "common/models/flux/names.h"
#include "common/models/lora/layouts.h"
#include "common/tensor/tensor.h"
#include "common/tensor/weight_file.h"
#include "pipelines/train/metadata.h"

namespace flux::train {
namespace {

constexpr char kLoraName[] = "lora.safetensors";
constexpr char kModelName[] = "model.safetensors";
constexpr char kAverageName[] = "ema.safetensors";
constexpr char kStateName[] = "state.safetensors";

at::ScalarType scalar_type_of(SaveDtype dtype) {
  switch (dtype) {
    case SaveDtype::kBF16:
      return at::kBFloat16;
    case SaveDtype::kF16:
      return at::kHalf;
    case SaveDtype::kF32:
      return at::kFloat;
  }
  throw std::invalid_argument("unknown dtype");
}

// Tensors on their way to a file: contiguous and on the CPU.
class Outgoing {
 public:
  void add(const std::string& name, const at::Tensor& tensor) {
    kept_.push_back(tensor.detach().cpu().contiguous());
    const at::Tensor& t = kept_.back();
    tensors_.push_back({{name, dtype_of(t), t.sizes().vec()}, host_bytes(t)});
  }
  const std::vector<checkpoint::Tensor>& tensors() const { return tensors_; }

 private:
  std::vector<at::Tensor> kept_;
  std::vector<checkpoint::Tensor> tensors_;
};

using Named = std::vector<std::pair<std::string, at::Tensor>>;

/// Under which prefix state.safetensors holds what is trained. The weights of a full fine-tuning are in the model's file,
/// unless others are to be kept in the end.
std::optional<std::string> weight_prefix(const Session& session) {
  if (session.options.method == Method::kLora) return "lora.";
  if (session.trainer->optimizer().averages()) return "weight.";
  return std::nullopt;
}

/// What state.safetensors holds of a trainable that is there.
Named state_of(const engine::Trainable& t, Session& session) {
  Named out;
  if (const auto prefix = weight_prefix(session))
    out.emplace_back(*prefix + t.name, t.value.detach());
  const auto layout =
      session.trainer->optimizer().state_layout(t.value.sizes(), t.value.scalar_type());
  for (size_t i = 0; i < layout.size(); ++i)
    out.emplace_back(layout[i].name + "." + t.name, t.states.at(i));
  return out;
}

void save_lora(Session& session, checkpoint::Writer& writer, bool average) {
  Outgoing adapters;
  for (const auto& [name, tensor] : lora::to_layout(session.trainer->adapters(average),
                                                    session.options.lora_layout,
                                                    session.config,
                                                    scalar_type_of(session.options.lora_dtype)))
    adapters.add(name, tensor);
  auto metadata = average ? averaged(lora_metadata(session), session) : lora_metadata(session);
  const auto hashes = checkpoint::lora_hashes(adapters.tensors(), metadata);
  metadata["sshs_model_hash"] = hashes.model_hash;
  metadata["sshs_legacy_hash"] = hashes.legacy_hash;
  writer.add(average ? kAverageName : kLoraName, adapters.tensors(), metadata);
}

/// Everything that is trained, with what state_of() gives of it.
struct Trained {
  std::string name;
  at::ScalarType type;
  std::vector<int64_t> shape;
};

std::vector<Trained> all_trained(const Session& session) {
  std::vector<Trained> out;
  if (session.options.method == Method::kFull) {
    for (const auto& [name, shape] : dit::tensor_shapes(session.config))
      out.push_back({name, session.compute, shape});
    return out;
  }
  for (const lora::Target& target : session.trainer->targets())
    for (const auto& [part, shape] : lora::part_shapes(target, session.trainer->options().form))
      out.push_back({target.path + "." + kAdapterParts[part], at::kFloat, shape});
  return out;
}

/// state.safetensors, and the model of a full fine-tuning, in one pass over the blocks.
void save_trained(Session& session, checkpoint::Writer& writer) {
  const bool full = session.options.method == Method::kFull;
  const Optimizer& optimizer = session.trainer->optimizer();
  const dit::FileTensors files(session.config, session.options.model_layout);
  std::vector<safetensors::TensorSpec> weights, states;
  for (const auto& [name, type, shape] : all_trained(session)) {
    if (full)
      for (const auto& piece : files.pieces(name))
        weights.push_back({piece.name, dtype_of(type), piece.shape});
    if (const auto prefix = weight_prefix(session))
      states.push_back({*prefix + name, dtype_of(type), shape});
    for (const auto& state : optimizer.state_layout(shape, type))
      states.push_back({state.name + "." + name, dtype_of(state.dtype), state.shape});
  }
  uint64_t needed = 0;
  const bool average = full && optimizer.keeps_average();
  for (const auto* specs : {&weights, &states})
    for (const auto& spec : *specs) needed += safetensors::tensor_bytes(spec.dtype, spec.shape);
  if (average)
    for (const auto& spec : weights) needed += safetensors::tensor_bytes(spec.dtype, spec.shape);
  require_free_space(session.options.out, needed);  // rather than to find out at the end
  {
    std::optional<safetensors::ScatteredWriter> model, ema;
    if (full) model.emplace(writer.path_of(kModelName), weights, model_metadata(session));
    if (average)
      ema.emplace(
          writer.path_of(kAverageName), weights, averaged(model_metadata(session), session));
    safetensors::ScatteredWriter state(writer.path_of(kStateName), states, {});
    session.trainer->model().for_all_trainables([&](engine::Trainable& t) {
      const Slot slot{t.value.detach(), {}, t.states, t.id};
      const auto write = [&](auto& file, const at::Tensor& tensor) {
        files.split(t.name, tensor, [&](const std::string& name, const at::Tensor& piece) {
          file->write(name, host_bytes(piece));
        });
      };
      if (model) write(model, optimizer.evaluation_weights(slot));
      if (ema) write(ema, optimizer.averaged_weights(slot));
      for (const auto& [name, tensor] : state_of(t, session))
        state.write(name, host_bytes(tensor.cpu().contiguous()));
      return false;
    });
    if (model) model->commit();
    if (ema) ema->commit();
    state.commit();
  }
  if (full) writer.added(kModelName);
  if (average) writer.added(kAverageName);
  writer.added(kStateName);
}

// What a resumed run must repeat, by the words of messages; all but the model's hash, which takes
// its time.
nlohmann::json identity(const Session& session) {
  return {{"options", deciding_options(session.options)},
          {"precision", precision_word(session.compute)},
          {"latents_sha256", session.data->latents_digest()},
          {"text_sha256", session.data->text_digest()}};
}

/// `what` differs; `name` is the flag that it comes from. Throws CacheError unless --allow-change names it.
void refuse(const std::string& name,
            const std::string& what,
            const nlohmann::json& now,
            const nlohmann::json& then,
            const Session& session,
            const checkpoint::Checkpoint& checkpoint) {
  const std::string difference = fmt::format("{} is {}, the checkpoint {} was made with {}",
                                             what,
                                             printable(now.dump()),
                                             show(checkpoint.folder),
                                             printable(then.dump()));
  const auto& allowed = session.options.allow_change;
  if (std::ranges::find(allowed, name) == allowed.end())
    throw CacheError(
        difference,
        fmt::format(
            "resume with what the run was started with, insist with --allow-change {}, or start a "
            "new run",
            name));
  log::warn("{}: allowed by --allow-change", difference);
}

}  // namespace

std::filesystem::path save(Session& session) {
  if (session.model_sha256.wait_for(std::chrono::seconds(1)) != std::future_status::ready) {
    log::info("waiting for the hash of {}", show(session.options.model));
  }
  const Options& o = session.options;
  const at::NoGradGuard no_grad;
  session.trainer->flush();
  checkpoint::Writer writer(o.out, session.step);
  if (o.method == Method::kLora) {
    save_lora(session, writer, /*average=*/false);
    if (session.trainer->optimizer().keeps_average()) save_lora(session, writer, /*average=*/true);
  }
  save_trained(session, writer);

  nlohmann::json record = identity(session);
  record["model_sha256"] = session.model_sha256.get();
  record["position"] = {{"epoch", session.position.epoch}, {"batch", session.position.batch}};
  if (session.validation && session.validation->step == session.step)
    record["validation"] = session.validation->object();
  record["optimizer_numbers"] = session.trainer->optimizer().numbers();
  record["provenance"] = {{"tool", "flux-train"},
                          {"tool_version", tool_version()},
                          {"commit", commit()},
                          {"command_line", printable(o.command_line)},
                          {"device", session.device.str()},
                          {"attention", attention_word(session)}};
  const auto folder = writer.commit(std::move(record));
  log::info("saved {}", show(folder));
  return folder;
}

std::filesystem::path weights_in(const std::filesystem::path& checkpoint) {
  return checkpoint / kModelName;
}

DataPosition position_of(const checkpoint::Checkpoint& checkpoint) {
  const auto position = checkpoint.state.value("position", nlohmann::json::object());
  if (!position.is_object() || !position.value("epoch", nlohmann::json()).is_number_unsigned() ||
      !position.value("batch", nlohmann::json()).is_number_unsigned()) {
    throw CacheError(fmt::format("{}: state.json has no position", show(checkpoint.folder)));
  }
  return {position["epoch"].get<int64_t>(), position["batch"].get<int64_t>()};
}

void require_same_run(const Session& session, const checkpoint::Checkpoint& checkpoint) {
  const nlohmann::json now = identity(session);
  const auto then_options = checkpoint.state.value("options", nlohmann::json::object());
  if (!then_options.is_object())
    throw CacheError(fmt::format("{}: state.json has no options", show(checkpoint.folder)));
  std::set<std::string> names;
  for (const auto* options : {&now["options"], &then_options}) {
    for (const auto& [name, value] : options->items()) names.insert(name);
  }
  for (const std::string& name : names) {
    const auto a = now["options"].value(name, nlohmann::json()),
               b = then_options.value(name, nlohmann::json());
    if (a != b) refuse(name, "--" + name, a, b, session, checkpoint);
  }
  const auto content = [](const std::filesystem::path& folder) {
    return fmt::format("the content of {} (SHA-256)", show(folder));
  };
  const std::tuple<const char*, const char*, std::string> others[] = {
      {"precision", "precision", "--precision"},
      {"latents_sha256", "latents", content(session.options.latents)},
      {"text_sha256", "text", content(session.options.text)}};
  for (const auto& [key, name, what] : others) {
    const auto then = checkpoint.state.value(key, nlohmann::json());
    if (now[key] != then) refuse(name, what, now[key], then, session, checkpoint);
    names.insert(name);
  }
  names.insert("model");
  for (const std::string& name : session.options.allow_change) {
    if (names.contains(name)) continue;
    const std::vector<std::string> known(names.begin(), names.end());
    const auto nearest = nearest_name(name, known);
    throw UsageError(
        fmt::format("--allow-change {}: no flag of that name decides this run", printable(name)),
        nearest ? fmt::format("did you mean {}?", *nearest)
                : "flags without dashes, such as learning-rate; what decides nothing may change "
                  "anyway");
  }
  const DataPosition position = position_of(checkpoint);
  if (position.batch >= session.data->num_batches()) {
    throw CacheError(fmt::format("{}: batch {} of an epoch of {}",
                                 show(checkpoint.folder),
                                 position.batch,
                                 session.data->num_batches()));
  }
}

void require_same_model(const Session& session, const checkpoint::Checkpoint& checkpoint) {
  const nlohmann::json model = session.model_sha256.get();
  const auto then = checkpoint.state.value("model_sha256", nlohmann::json());
  if (model != then)
    refuse("model",
           fmt::format("{} (weights_sha256)", show(session.options.model)),
           model,
           then,
           session,
           checkpoint);
}

void restore(Session& session, const checkpoint::Checkpoint& checkpoint) {
  require_same_model(session, checkpoint);
  const auto file = checkpoint.folder / kStateName;
  WeightFile saved;
  try {
    saved = read_weights(file);
  } catch (const InputError& error) {
    throw CacheError(error.what());
  }
  const at::NoGradGuard no_grad;
  size_t num_wanted = 0;
  session.trainer->model().for_all_trainables([&](engine::Trainable& t) {
    for (const auto& [name, tensor] : state_of(t, session)) {
      ++num_wanted;
      const auto found = saved.tensors.find(name);
      if (found == saved.tensors.end() || found->second.sizes() != tensor.sizes() ||
          found->second.scalar_type() != tensor.scalar_type()) {
        throw CacheError(fmt::format("{}: {} is {}, expected {} {}",
                                     show(file),
                                     name,
                                     found == saved.tensors.end()
                                         ? "absent"
                                         : fmt::format("{} {}",
                                                       c10::toString(found->second.scalar_type()),
                                                       shape_text(found->second)),
                                     c10::toString(tensor.scalar_type()),
                                     shape_text(tensor)));
      }
      tensor.copy_(found->second);
    }
    return true;
  });
  if (saved.tensors.size() != num_wanted) {
    throw CacheError(
        fmt::format("{}: {} tensors, expected {}", show(file), saved.tensors.size(), num_wanted));
  }
  try {
    session.trainer->optimizer().set_numbers(
        checkpoint.state.value("optimizer_numbers", std::map<std::string, double>()));
  } catch (const nlohmann::json::exception&) {
    throw CacheError(show(checkpoint.folder) + ": the optimizer's numbers are none");
  }
  session.step = checkpoint.step;
  session.position = position_of(checkpoint);
}

}  // namespace flux::train
