#include "pipelines/train/save.h"

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <set>
#include <utility>
#include <vector>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/core/version.h"
#include "common/tensor/tensor.h"
#include "common/tensor/weight_file.h"
#include "pipelines/train/metadata.h"

namespace flux::train {
namespace {

constexpr char kLoraName[] = "lora.safetensors";
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

std::vector<std::pair<std::string, at::Tensor>> state_tensors(const Session& session) {
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (const Parameter& p : session.parameters) {
    out.emplace_back("lora." + p.name, p.value.detach());
    out.emplace_back("exp_avg." + p.name, p.exp_avg);
    out.emplace_back("exp_avg_sq." + p.name, p.exp_avg_sq);
  }
  return out;
}

// What a resumed run must repeat, by the words of messages; all but the model's hash, which takes
// its time.
nlohmann::json identity(const Session& session) {
  return {{"options", deciding_options(session.options)},
          {"precision", precision_word(session.compute)},
          {"latents_sha256", session.data->latents_digest()},
          {"text_sha256", session.data->text_digest()}};
}

[[noreturn]] void refuse(const std::string& what,
                         const nlohmann::json& now,
                         const nlohmann::json& then,
                         const checkpoint::Checkpoint& checkpoint) {
  throw CacheError(fmt::format("{} is {}, the checkpoint {} was made with {}",
                               what,
                               printable(now.dump()),
                               show(checkpoint.folder),
                               printable(then.dump())),
                   "resume with what the run was started with, or start a new run");
}

}  // namespace

std::filesystem::path save(const Session& session) {
  if (session.model_sha256.wait_for(std::chrono::seconds(1)) != std::future_status::ready) {
    log::info("waiting for the hash of {}", show(session.options.model));
  }
  const Options& o = session.options;
  checkpoint::Writer writer(o.out, session.step);

  Outgoing adapters;
  for (const auto& [name, tensor] : lora::to_kohya(session.adapters, scalar_type_of(o.lora_dtype)))
    adapters.add(name, tensor);
  auto metadata = lora_metadata(session);
  const auto hashes = checkpoint::lora_hashes(adapters.tensors(), metadata);
  metadata["sshs_model_hash"] = hashes.model_hash;
  metadata["sshs_legacy_hash"] = hashes.legacy_hash;
  writer.add(kLoraName, adapters.tensors(), metadata);

  Outgoing state;
  for (const auto& [name, tensor] : state_tensors(session)) state.add(name, tensor);
  writer.add(kStateName, state.tensors(), {});

  nlohmann::json record = identity(session);
  record["model_sha256"] = session.model_sha256.get();
  record["position"] = {{"epoch", session.position.epoch}, {"batch", session.position.batch}};
  record["provenance"] = {{"tool", "flux-train"},
                          {"tool_version", tool_version()},
                          {"commit", commit()},
                          {"command_line", printable(o.command_line)},
                          {"device", session.device.str()}};
  const auto folder = writer.commit(std::move(record));
  log::info("saved {}", show(folder));
  return folder;
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
    if (a != b) refuse("--" + name, a, b, checkpoint);
  }
  const std::map<std::string, std::string> words{
      {"precision", "--precision"},
      {"latents_sha256", fmt::format("the content of {} (SHA-256)", show(session.options.latents))},
      {"text_sha256", fmt::format("the content of {} (SHA-256)", show(session.options.text))}};
  for (const auto& [name, what] : words) {
    const auto then = checkpoint.state.value(name, nlohmann::json());
    if (now[name] != then) refuse(what, now[name], then, checkpoint);
  }
  const DataPosition position = position_of(checkpoint);
  if (position.batch >= session.data->num_batches()) {
    throw CacheError(fmt::format("{}: batch {} of an epoch of {}",
                                 show(checkpoint.folder),
                                 position.batch,
                                 session.data->num_batches()));
  }
}

void restore(Session& session, const checkpoint::Checkpoint& checkpoint) {
  const nlohmann::json model = session.model_sha256.get();
  const auto then = checkpoint.state.value("model_sha256", nlohmann::json());
  if (model != then)
    refuse(
        fmt::format("{} (weights_sha256)", show(session.options.model)), model, then, checkpoint);

  const auto file = checkpoint.folder / kStateName;
  WeightFile saved;
  try {
    saved = read_weights(file);
  } catch (const InputError& error) {
    throw CacheError(error.what());
  }
  const at::NoGradGuard no_grad;
  const auto wanted = state_tensors(session);
  for (const auto& [name, tensor] : wanted) {
    const auto found = saved.tensors.find(name);
    if (found == saved.tensors.end() || found->second.sizes() != tensor.sizes() ||
        found->second.scalar_type() != at::kFloat) {
      throw CacheError(
          fmt::format("{}: {} is {}, expected F32 {}",
                      show(file),
                      name,
                      found == saved.tensors.end() ? "absent" : shape_text(found->second),
                      shape_text(tensor)));
    }
    tensor.copy_(found->second);
  }
  if (saved.tensors.size() != wanted.size()) {
    throw CacheError(fmt::format(
        "{}: {} tensors, expected {}", show(file), saved.tensors.size(), wanted.size()));
  }
  session.step = checkpoint.step;
  session.position = position_of(checkpoint);
}

}  // namespace flux::train
