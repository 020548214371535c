#include "pipelines/train/save.h"

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
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
#include "common/optim/blockwise8_math.h"
#include "common/tensor/tensor.h"
#include "common/tensor/weight_file.h"
#include "pipelines/train/metadata.h"
#include "pipelines/train/ranks.h"

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

/// Under which prefix state.safetensors holds what is trained. The weights of a full fine-tuning are in the model's file,
/// unless others are to be kept in the end.
std::optional<std::string> weight_prefix(const Session& session) {
  if (session.options.method == Method::kLora) return "lora.";
  if (session.trainer->optimizer().averages()) return "weight.";
  return std::nullopt;
}

/// Of a tensor of state.safetensors: its elements from `first` on.
struct Elements {
  std::string name;
  int64_t first = 0;
  at::Tensor values;
};

/// What state.safetensors holds of a trainable that is there, or of the part that it is.
std::vector<Elements> state_of(const engine::Trainable& t, const Session& session) {
  std::vector<Elements> out;
  if (const auto prefix = weight_prefix(session))
    out.push_back({*prefix + t.name, t.offset, t.value.detach()});
  const at::IntArrayRef whole = t.whole.empty() ? t.value.sizes() : at::IntArrayRef(t.whole);
  const int64_t num_elements = c10::multiply_integers(whole);
  const auto layout = session.trainer->optimizer().state_layout(whole, t.value.scalar_type());
  for (size_t i = 0; i < layout.size(); ++i) {
    const at::Tensor& state = t.states.at(i);
    // one for each element, or one for so many of them
    const bool is_scale = c10::multiply_integers(layout[i].shape) < num_elements;
    out.push_back({layout[i].name + "." + t.name, is_scale ? t.offset / kBlock8 : t.offset, state});
  }
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

/// What save_trained() writes.
struct Contents {
  std::vector<safetensors::TensorSpec> weights, states;
  bool average = false;  // beside the weights of a full fine-tuning
  uint64_t bytes = 0;
};

Contents contents_of(const Session& session) {
  const bool full = session.options.method == Method::kFull;
  const Optimizer& optimizer = session.trainer->optimizer();
  const dit::FileTensors files(session.config, session.options.model_layout);
  Contents out;
  for (const auto& [name, type, shape] : all_trained(session)) {
    if (full)
      for (const auto& piece : files.pieces(name))
        out.weights.push_back({piece.name, dtype_of(type), piece.shape});
    if (const auto prefix = weight_prefix(session))
      out.states.push_back({*prefix + name, dtype_of(type), shape});
    for (const auto& state : optimizer.state_layout(shape, type))
      out.states.push_back({state.name + "." + name, dtype_of(state.dtype), state.shape});
  }
  out.average = full && optimizer.keeps_average();
  const auto add = [&](const std::vector<safetensors::TensorSpec>& specs) {
    for (const auto& spec : specs) out.bytes += safetensors::tensor_bytes(spec.dtype, spec.shape);
  };
  add(out.weights);
  add(out.states);
  if (out.average) add(out.weights);
  return out;
}

/// The files that are written in one pass over the blocks: state.safetensors, and of a full fine-tuning its model and
/// maybe the average.
class TrainedFiles {
 public:
  using Writer = safetensors::ScatteredWriter;

  /// Makes them.
  TrainedFiles(const Session& session, const checkpoint::Writer& checkpoint)
      : layout_(layout_of(session)) {
    const auto contents = contents_of(session);
    if (session.options.method == Method::kFull)
      files_.emplace_back(
          kModelName,
          std::make_unique<Writer>(
              checkpoint.path_of(kModelName), contents.weights, model_metadata(session)));
    if (contents.average)
      files_.emplace_back(kAverageName,
                          std::make_unique<Writer>(checkpoint.path_of(kAverageName),
                                                   contents.weights,
                                                   averaged(model_metadata(session), session)));
    files_.emplace_back(
        kStateName,
        std::make_unique<Writer>(
            checkpoint.path_of(kStateName), contents.states, safetensors::Metadata{}));
  }
  /// Opens those that rank 0 has made, by what its share() says.
  TrainedFiles(const Session& session, const nlohmann::json& shared) : layout_(layout_of(session)) {
    const auto contents = contents_of(session);
    const auto folder = session.options.out / shared.at("folder").get<std::string>();
    for (const auto& file : shared.at("files")) {
      const auto name = file.at("name").get<std::string>();
      files_.emplace_back(
          name,
          std::make_unique<Writer>(folder / name,
                                   name == kStateName ? contents.states : contents.weights,
                                   Writer::Shared{file.at("temporary"), file.at("data_begin")}));
    }
  }

  nlohmann::json share(const checkpoint::Writer& checkpoint) {
    nlohmann::json files = nlohmann::json::array();
    for (const auto& [name, file] : files_) {
      const auto shared = file->share();
      files.push_back(
          {{"name", name}, {"temporary", shared.temporary}, {"data_begin", shared.data_begin}});
    }
    return {{"folder", checkpoint.path_of(kStateName).parent_path().filename().native()},
            {"files", files}};
  }

  /// All that this rank has to write.
  void write(Session& session) {
    const Optimizer& optimizer = session.trainer->optimizer();
    const auto& ranks = session.trainer->options().ranks;
    // of several copies the first is written, and by its first rank what all have
    if (ranks.rank >= ranks.shard_world) return;
    session.trainer->model().for_all_trainables([&](engine::Trainable& t) {
      if (ranks.rank > 0 && t.whole.empty()) return false;
      const Slot slot{t.value.detach(), {}, t.states, t.id, t.offset};
      for (const auto& [name, file] : files_) {
        if (name == kStateName) {
          for (const auto& [state, first, values] : state_of(t, session))
            put(*file, state, first, values);
        } else {
          const at::Tensor weights = name == kModelName ? optimizer.evaluation_weights(slot)
                                                        : optimizer.averaged_weights(slot);
          layout_.split_part(
              t.name,
              weights,
              t.offset,
              [&](const std::string& piece, int64_t first, const at::Tensor& values) {
                put(*file, piece, first, values);
              });
        }
      }
      return false;
    });
  }

  /// Of each file, in order.
  std::vector<std::vector<Writer::Range>> leave() {
    std::vector<std::vector<Writer::Range>> out;
    for (const auto& [name, file] : files_) out.push_back(file->leave());
    return out;
  }
  void add_written(size_t file, std::span<const Writer::Range> ranges) {
    files_.at(file).second->add_written(ranges);
  }
  size_t size() const { return files_.size(); }

  void commit(checkpoint::Writer& checkpoint) {
    for (const auto& [name, file] : files_) file->commit();
    for (const auto& [name, file] : files_) checkpoint.added(name);
  }

 private:
  static dit::FileTensors layout_of(const Session& session) {
    return dit::FileTensors(session.config, session.options.model_layout);
  }
  static void put(Writer& file, const std::string& name, int64_t first, const at::Tensor& values) {
    file.write_part(name,
                    static_cast<uint64_t>(first) * values.element_size(),
                    host_bytes(values.cpu().contiguous()));
  }

  dit::FileTensors layout_;
  std::vector<std::pair<std::string, std::unique_ptr<Writer>>> files_;
};

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

/// Beside the files of tensors.
nlohmann::json record_of(const Session& session) {
  const Options& o = session.options;
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
  return record;
}

}  // namespace

std::filesystem::path save(Session& session) {
  const bool shared = shares_weights(session);
  if (!shared && !session.leads()) return {};
  if (session.leads() &&
      session.model_sha256.wait_for(std::chrono::seconds(1)) != std::future_status::ready)
    log::info("waiting for the hash of {}", show(session.options.model));
  const Options& o = session.options;
  const at::NoGradGuard no_grad;
  session.trainer->flush();
  std::optional<checkpoint::Writer> writer;
  std::optional<TrainedFiles> files;
  const auto jointly = [&](const std::function<void()>& work) {
    shared ? together(session, work) : work();
  };
  std::string place;
  jointly([&] {
    if (!session.leads()) return;
    require_free_space(o.out, checkpoint_bytes(session));  // rather than to find out at the end
    writer.emplace(o.out, session.step);
    if (o.method == Method::kLora) {
      save_lora(session, *writer, /*average=*/false);
      if (session.trainer->optimizer().keeps_average())
        save_lora(session, *writer, /*average=*/true);
    }
    files.emplace(session, *writer);
    if (shared) place = files->share(*writer).dump();
  });
  if (shared) place = gather_bytes(session, place)[0];
  std::vector<std::vector<safetensors::ScatteredWriter::Range>> written;  // by file; of the others
  jointly([&] {
    if (session.leads()) return files->write(session);
    TrainedFiles joined(session, nlohmann::json::parse(place));
    joined.write(session);
    written = joined.leave();
  });
  if (shared) {
    const auto num_files = nlohmann::json::parse(place).at("files").size();
    written.resize(num_files);
    for (size_t i = 0; i < num_files; ++i) {
      const auto all = gather_values<safetensors::ScatteredWriter::Range>(session, written[i]);
      if (session.leads())
        for (const auto& ranges : all) files->add_written(i, ranges);
    }
  }
  std::filesystem::path folder;
  jointly([&] {
    if (!session.leads()) return;
    files->commit(*writer);
    folder = writer->commit(record_of(session));
    log::info("saved {}", show(folder));
  });
  return folder;
}

uint64_t checkpoint_bytes(const Session& session) { return contents_of(session).bytes; }

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
  if (!session.leads()) return;  // whose weights are rank 0's: see require_same_ranks()
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
  const auto wanted = contents_of(session).states;
  for (const auto& [name, dtype, shape] : wanted) {
    const auto found = saved.tensors.find(name);
    if (found != saved.tensors.end() && dtype_of(found->second) == dtype &&
        found->second.sizes() == shape)
      continue;
    throw CacheError(fmt::format(
        "{}: {} is {}, expected {} [{}]",
        show(file),
        name,
        found == saved.tensors.end()
            ? "absent"
            : fmt::format("{} {}", dtype_name(dtype_of(found->second)), shape_text(found->second)),
        dtype_name(dtype),
        fmt::join(shape, ", ")));
  }
  if (saved.tensors.size() != wanted.size()) {
    throw CacheError(fmt::format(
        "{}: {} tensors, expected {}", show(file), saved.tensors.size(), wanted.size()));
  }
  const at::NoGradGuard no_grad;
  session.trainer->model().for_all_trainables([&](engine::Trainable& t) {
    for (const auto& [name, first, values] : state_of(t, session))
      values.copy_(
          saved.tensors.at(name).view({-1}).narrow(0, first, values.numel()).view(values.sizes()));
    return true;
  });
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
