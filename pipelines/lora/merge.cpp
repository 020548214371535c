#include "pipelines/lora/merge.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/engine/model_file.h"
#include "common/models/flux/load.h"
#include "common/models/flux/names.h"
#include "common/models/weights/weights.h"
#include "common/ops/adapter.h"
#include "common/quant/quant.h"
#include "common/tensor/tensor.h"
#include "formats/safetensors/set_writer.h"
#include "pipelines/lora/lora_file.h"
#include "pipelines/lora/svd.h"

namespace flux::lora_tools {
namespace fs = std::filesystem;
namespace {

constexpr uint64_t kProgressUnit = 1000000;
constexpr char kMerged[] = "flux_stages.merged";
constexpr int64_t kChunkElements = int64_t{1} << 22;

using Inputs = std::vector<std::unique_ptr<LoraInput>>;

Inputs open_all(const MergeOptions& options, std::optional<dit::Config> config) {
  Inputs inputs;
  for (const std::string& text : options.files) {
    const auto [file, weight] = lora::weighted_file(text);
    inputs.push_back(std::make_unique<LoraInput>(file, config, weight));
  }
  return inputs;
}

/// [{"file": "a.safetensors", "weight": 0.8}, ...], without folders.
std::string merged_text(const Inputs& inputs) {
  nlohmann::json out = nlohmann::json::array();
  for (const auto& input : inputs)
    out.push_back(
        {{"file", printable(input->path().filename().native())}, {"weight", input->weight()}});
  return out.dump();
}

// --- into a model

struct Change {
  lora::Entry entry;
  double weight = 1;
  LowRank added{};  // in float32, with the scale that the rows are given
};

LowRank low_rank_of(const lora::Module& module, double scale) {
  const auto wide = [](const at::Tensor& tensor) {
    return tensor.defined() ? to_dtype(tensor, at::kFloat) : tensor;
  };
  return {
      .down = wide(module.down), .up = wide(module.up), .scale = scale, .mix = wide(module.mix)};
}

/// Adds to rows [first, ..) of W, in float32.
void add_rows(const at::Tensor& rows, int64_t first, const std::vector<Change>& changes) {
  // DoRA scales W alone, whatever else is added
  bool needs_before = false;
  for (const Change& change : changes)
    needs_before = needs_before || change.entry.module.magnitude.defined();
  const at::Tensor before = needs_before ? rows.clone() : rows;
  const int64_t count = rows.size(0);
  for (const auto& [entry, weight, added] : changes) {
    if (entry.diff.defined())
      rows.add_(to_dtype(entry.diff.narrow(0, first, count), at::kFloat), weight);
    if (!entry.module.down.defined()) continue;
    if (!entry.module.magnitude.defined()) {
      add_delta(rows, first, added);
      continue;
    }
    const at::Tensor alone = before.clone();
    add_delta(alone, first, added);
    alone.mul_(
        to_dtype(entry.module.magnitude.narrow(0, first, count), at::kFloat) /
        alone.norm(2, {1}, /*keepdim=*/true).clamp_min_(std::numeric_limits<float>::epsilon()));
    rows.add_(alone.sub_(before), weight);
  }
}

class ModelMerge {
 public:
  explicit ModelMerge(const MergeOptions& options)
      : options_(options),
        model_(options.base, {.dtype = at::kBFloat16}),
        config_(widened(options, model_.config())),
        inputs_(open_all(options, config_)) {
    if (model_.quant())
      throw InputError(show(options.base) + ": is quantised, a LoRA would be lost in its rounding",
                       "merge into the file that it was made of, then quantise the result with "
                       "flux-model convert");
    std::error_code error;
    if (fs::equivalent(options.base, options.output.out, error))
      throw UsageError(show(options.output.out) + ": --out is the file that --base reads",
                       "write to another file");
    const NetTensors net = take_net(read_weights(options.base), NetKind::kFlux);
    const bool is_bfl = net.tensors.contains("img_in.weight");
    for (const auto& [name, parts] : dit::canonical_parts(net, model_.config()))
      stored_[name] = parts.at(0).tensor.scalar_type();
    layout_ = options.model_layout.value_or(is_bfl ? dit::ModelLayout::kBfl
                                                   : dit::ModelLayout::kDiffusers);
  }

  ModelReport run() {
    for (const auto& input : inputs_)
      if (const size_t n = input->adapters().text_modules().size(); n > 0)
        log::warn("{}: {} modules of text encoders are left out: --base is a transformer",
                  show(input->path()),
                  n);
    const dit::FileTensors tensors(config_, layout_);
    std::vector<safetensors::TensorSpec> specs;
    const auto shapes = dit::tensor_shapes(config_);
    for (const auto& [name, shape] : shapes)
      for (const auto& piece : tensors.pieces(name))
        specs.push_back({piece.name, dtype_of(type_of(name)), piece.shape});
    auto metadata = model_.metadata();
    metadata.merge(safetensors::pt_metadata());
    metadata[kMerged] = merged_text(inputs_);
    const bool diffusers = layout_ == dit::ModelLayout::kDiffusers;
    const safetensors::SetPlace place{options_.output.out,
                                      diffusers ? "diffusion_pytorch_model" : "model",
                                      static_cast<uint64_t>(options_.shard_bytes)};
    safetensors::SetWriter writer(place, specs, metadata, kMerged, "flux-lora merge");
    Progress progress("merge", "MB", static_cast<int64_t>(writer.total_bytes() / kProgressUnit));
    ModelReport report;
    for (const auto& [name, shape] : shapes) {
      cancel::check();
      at::Tensor tensor = read(name, shape);
      if (change(name, tensor)) ++report.changed;
      tensors.split(name,
                    to_dtype(tensor, type_of(name)),
                    [&](const std::string& n, const at::Tensor& piece) {
                      writer.write(n, host_bytes(piece));
                    });
      for (const auto& input : inputs_) input->release();
      ++report.tensors;
      progress.update(static_cast<int64_t>(writer.written_bytes() / kProgressUnit));
    }
    if (diffusers && place.folder() == place.out)
      write_file_atomic(place.out / "config.json", dit::diffusers_config_json(config_));
    writer.commit();
    report.file = writer.path();
    report.files = writer.num_files();
    report.bytes = static_cast<int64_t>(writer.total_bytes());
    report.seconds = progress.seconds();
    report.peak_rss_bytes = flux::peak_rss_bytes();
    return report;
  }

 private:
  /// The model with the inputs that control LoRAs adapt: as many as they have, the new columns zero.
  static dit::Config widened(const MergeOptions& options, dit::Config config) {
    for (const std::string& text : options.files) {
      const LoraInput input(lora::weighted_file(text).file);
      if (input.has("img_in"))
        config.in_channels = std::max(config.in_channels, input.adapters().config().in_channels);
    }
    return config;
  }

  at::Tensor read(const std::string& name, const std::vector<int64_t>& shape) const {
    const int64_t columns = model_.config().in_channels;
    if (name != "img_in.weight" || shape[1] == columns) {
      const at::Tensor tensor = at::empty(shape, stored_.at(name));
      model_.read_tensor(name, tensor);
      return tensor;
    }
    const at::Tensor narrow = at::empty({shape[0], columns}, stored_.at(name)),
                     wide = at::zeros(shape, stored_.at(name));
    model_.read_tensor(name, narrow);
    wide.narrow(1, 0, columns).copy_(narrow);
    return wide;
  }

  at::ScalarType type_of(const std::string& name) const {
    return scalar_type_of(options_.output.dtype).value_or(stored_.at(name));
  }

  /// Whether any LoRA changes the tensor, which is then of the dtype to be written.
  bool change(const std::string& name, at::Tensor& tensor) {
    const std::string path = name.substr(0, name.rfind('.'));
    bool changed = false;
    if (name.ends_with(".scale")) {
      const at::Tensor before = to_dtype(tensor, at::kFloat);
      at::Tensor sum;
      for (const auto& input : inputs_) {
        const auto found = input->adapters().replaced().find(name);
        if (found == input->adapters().replaced().end()) continue;
        if (!sum.defined()) sum = before.clone();
        sum.add_(to_dtype(found->second, at::kFloat) - before, input->weight());
      }
      if (!sum.defined()) return false;
      tensor = to_dtype(sum, type_of(name));
      return true;
    }
    std::vector<Change> changes;
    for (const auto& input : inputs_)
      if (input->has(path)) changes.push_back({input->entry(path), input->weight()});
    if (name.ends_with(".bias")) {
      at::Tensor sum;
      for (const auto& [entry, weight, added] : changes) {
        if (!entry.bias.defined()) continue;
        if (!sum.defined()) sum = to_dtype(tensor, at::kFloat).clone();
        sum.add_(to_dtype(entry.bias, at::kFloat), weight);
      }
      if (!sum.defined()) return false;
      tensor = to_dtype(sum, type_of(name));
      return true;
    }
    bool by_groups = false;  // LoKr works on whole groups of rows
    for (Change& c : changes) {
      const lora::Module& module = c.entry.module;
      if (module.down.defined())
        c.added =
            low_rank_of(module, module.scale() * (module.magnitude.defined() ? 1 : c.weight));
      changed = changed || c.entry.module.down.defined() || c.entry.diff.defined();
      by_groups = by_groups || c.entry.module.mix.defined();
    }
    if (!changed) return false;
    const at::Tensor out = at::empty(tensor.sizes(), type_of(name));
    const int64_t step =
        by_groups ? tensor.size(0) : std::max<int64_t>(1, kChunkElements / tensor.size(1));
    for (int64_t first = 0; first < tensor.size(0); first += step) {
      const int64_t count = std::min(step, tensor.size(0) - first);
      const at::Tensor part = tensor.narrow(0, first, count);
      const at::Tensor rows = to_dtype(part, at::kFloat).clone();
      add_rows(rows, first, changes);
      const at::Tensor rounded = to_dtype(rows, out.scalar_type());
      if (!at::isfinite(to_dtype(rounded, at::kFloat)).all().item<bool>())
        throw InputError(
            fmt::format(
                "{}: with the LoRA, {} holds infinite values or NaN", show(options_.base), name),
            "check the files with flux-model info and flux-lora info; lower the weight");
      out.narrow(0, first, count).copy_(rounded);
    }
    tensor = out;
    return true;
  }

  const MergeOptions& options_;
  engine::ModelFile model_;
  dit::Config config_;
  Inputs inputs_;
  std::map<std::string, at::ScalarType> stored_;
  dit::ModelLayout layout_ = dit::ModelLayout::kBfl;
};

// --- into a LoRA

/// Downs and ups side by side. `one_scale`: all have the same, which stays in alpha.
lora::Module side_by_side(const std::string& path, const std::vector<Change>& changes) {
  std::vector<at::Tensor> downs, ups;
  std::vector<double> scales;
  for (const auto& [entry, weight, added] : changes) {
    if (!entry.module.down.defined()) continue;
    const lora::Module module = lora::without_lokr(entry.module);
    downs.push_back(module.down);
    ups.push_back(module.up);
    scales.push_back(weight * module.scale());
  }
  const bool one_scale =
      std::ranges::all_of(scales, [&](double scale) { return scale == scales[0]; });
  for (size_t i = 0; i < ups.size() && !one_scale; ++i)
    ups[i] = (to_dtype(ups[i], at::kFloat).to(at::kDouble) * scales[i]).to(at::kFloat);
  lora::Module out{path, at::cat(downs, 0), at::cat(ups, 1)};
  out.alpha = (one_scale ? scales[0] : 1) * static_cast<double>(out.rank());
  return out;
}

void add_weighted(at::Tensor& sum, const at::Tensor& tensor, double weight) {
  if (!tensor.defined()) return;
  const at::Tensor term = to_dtype(tensor, at::kFloat) * weight;
  sum = sum.defined() ? sum + term : term;
}

}  // namespace

void add_flags(MergeOptions& o, Tool& tool) {
  tool.about(
      "Adds LoRAs to a transformer (--base), or to one LoRA.",
      "flux-lora merge style.safetensors:0.8 face.safetensors --base flux1-dev.safetensors --out "
      "merged.safetensors");
  tool.arguments(o.files, "FILE[:WEIGHT]...", "LoRAs in any layout, and how much of each (1)");
  tool.flag(
      "base",
      o.base,
      "FILE",
      "transformer to add them to: a file, a sharded index, or a folder; none: make one LoRA");
  tool.flag("out", o.output.out, "FILE", "model or LoRA to write");
  tool.flag("dtype",
            o.output.dtype,
            out_dtypes(),
            "of what is written; auto: the model's, or of a LoRA as the matrices are");
  tool.group("a model");
  tool.flag(
      "model-layout", o.model_layout, dit::model_layouts(), "names of the tensors", "as in --base");
  tool.bytes_flag("shard-size",
                  o.shard_bytes,
                  "most bytes of a file: NAME-00001-of-0000N.safetensors and an index",
                  "one file");
  tool.group("a LoRA");
  tool.flag(
      "to", o.output.layout, lora::layout_words(), "layout of --out", "that of the first file");
  add_rank_flags(o.rank, tool, "most ranks of a module, by SVD; not given: all, which is exact");
}

void check(const MergeOptions& o, const Tool& tool) {
  if (o.files.empty())
    throw UsageError("no LoRA given",
                     "flux-lora merge a.safetensors:0.8 b.safetensors --out c.safetensors");
  for (const std::string& file : o.files) lora::weighted_file(file);
  check_output(o.output);
  check_rank(o.rank);
  const auto refuse = [&](std::initializer_list<const char*> names, const char* why) {
    for (const char* name : names)
      if (tool.given(name))
        throw UsageError(fmt::format("--{} has no effect {}", name, why), "leave it out");
  };
  if (o.base.empty())
    refuse({"model-layout", "shard-size"}, "without --base");
  else
    refuse({"to", "rank", "sv-ratio", "sv-frobenius", "sv-cumulative"}, "with --base");
}

ModelReport merge_into_base(const MergeOptions& options) { return ModelMerge(options).run(); }

WriteReport merge_into_lora(const MergeOptions& options) {
  const Inputs inputs = open_all(options, std::nullopt);
  const dit::Config config = common_config(inputs);
  std::vector<fs::path> paths;
  for (const auto& input : inputs) paths.push_back(input->path());
  const lora::Layout layout = options.output.layout.value_or(inputs[0]->adapters().layout());
  LoraOutput output(options.output, layout, config, paths);
  const auto targets = all_adapted(inputs, config);
  Progress progress("merge", "modules", std::ssize(targets));
  const bool reduces = options.rank.rank || options.rank.has_threshold();
  const bool alone = inputs.size() == 1 && inputs[0]->weight() == 1;
  std::vector<int64_t> ranks;
  double error = 0;
  int64_t done = 0;
  for (const lora::Target& target : targets) {
    std::vector<Change> changes;
    bool has_pair = false;
    lora::Entry sum;
    sum.module.path = target.path;
    for (const auto& input : inputs) {
      if (!input->has(target.path)) continue;
      changes.push_back({input->entry(target.path), input->weight()});
      const lora::Entry& entry = changes.back().entry;
      if (entry.module.magnitude.defined() && (!alone || reduces))
        throw InputError(
            fmt::format("{}: {}: DoRA cannot be added to one LoRA: its rows are scaled "
                        "to norms that depend on the model",
                        show(input->path()),
                        target.path),
            "merge into the model with --base, or resize it alone");
      has_pair = has_pair || entry.module.down.defined();
      add_weighted(sum.diff, entry.diff, input->weight());
      add_weighted(sum.bias, entry.bias, input->weight());
    }
    if (alone && !reduces) {
      sum = changes[0].entry;
    } else if (has_pair) {
      sum.module = side_by_side(target.path, changes);
      if (reduces) reduce(sum.module, options.rank, error);
    }
    if (has_pair) ranks.push_back(sum.module.rank());
    output.write(sum);
    for (const auto& input : inputs) input->release();
    progress.update(++done);
  }
  // text encoders: by encoder and path
  std::map<std::pair<int, std::string>, std::vector<std::pair<const lora::TextModule*, double>>>
      texts;
  for (const auto& input : inputs) {
    for (const auto& module : input->adapters().text_modules())
      texts[{static_cast<int>(module.encoder), module.path}].emplace_back(&module, input->weight());
    for (const auto& [name, tensor] : input->adapters().replaced()) {
      if (!alone)
        throw InputError(
            fmt::format(
                "{}: {} is replaced, which cannot be added to one LoRA", show(input->path()), name),
            "merge into the model with --base");
      output.write_replaced(name, tensor);
    }
    if (!input->adapters().embeddings().empty())
      log::warn("{}: {} embeddings are left out",
                show(input->path()),
                input->adapters().embeddings().size());
  }
  for (const auto& [key, modules] : texts) {
    std::vector<Change> changes;
    for (const auto& [module, weight] : modules) {
      Change change;
      change.entry.module = {module->path, module->down, module->up, module->alpha};
      change.weight = weight;
      changes.push_back(std::move(change));
    }
    lora::Module sum = side_by_side(key.second, changes);
    if (reduces) reduce(sum, options.rank, error);
    output.write(
        lora::TextModule{modules[0].first->encoder, key.second, sum.down, sum.up, sum.alpha});
  }
  lora::Metadata metadata = kept_metadata(inputs[0]->metadata());
  set_rank(metadata, ranks);
  metadata[kMerged] = merged_text(inputs);
  output.commit(std::move(metadata));
  WriteReport report{.file = options.output.out,
                     .layout = std::string(lora::layout_name(layout)),
                     .modules = targets.size() + texts.size(),
                     .tensors = output.num_tensors(),
                     .bytes = static_cast<int64_t>(output.bytes()),
                     .seconds = progress.seconds()};
  if (reduces) report.error = error;
  if (!ranks.empty()) {
    const auto [low, high] = std::ranges::minmax(ranks);
    report.ranks = {low, high};
  }
  return report;
}

std::string ModelReport::line() const {
  return fmt::format(
      "wrote {} files={} changed={} tensors={} bytes={} seconds={:.1f} rate={}/s peak_rss={}",
      show(file),
      files,
      changed,
      tensors,
      bytes,
      seconds,
      show_bytes(static_cast<uint64_t>(static_cast<double>(bytes) / std::max(seconds, 1e-3))),
      show_bytes(peak_rss_bytes));
}

nlohmann::json ModelReport::json() const {
  return {{"file", printable(file.native())},
          {"files", files},
          {"changed", changed},
          {"tensors", tensors},
          {"bytes", bytes},
          {"seconds", seconds},
          {"peak_rss_bytes", peak_rss_bytes}};
}

}  // namespace flux::lora_tools
