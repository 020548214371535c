#include "pipelines/lora/check.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/engine/model_file.h"
#include "common/tensor/tensor.h"
#include "pipelines/lora/lora_file.h"

namespace flux::lora_tools {
namespace {

constexpr int64_t kInputs = 8;  // random vectors a layer

at::Tensor wide(const at::Tensor& tensor) { return to_dtype(tensor, at::kFloat).to(at::kDouble); }

at::Tensor random(at::IntArrayRef shape, int64_t seed, const std::string& name) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(
      xxh3_64(as_bytes(name)) ^ static_cast<uint64_t>(seed) * 0x9E3779B97F4A7C15u);
  return at::randn(shape, generator, at::TensorOptions(at::kDouble));
}

/// x delta^T of a pair, [inputs, out].
at::Tensor apply(const lora::Module& given, const at::Tensor& x) {
  const lora::Module module = lora::without_lokr(given);
  return at::mm(at::mm(x, wide(module.down).t()), wide(module.up).t()) * module.scale();
}

/// What an entry adds to the layer's output.
///   weight  makes the layer's weight; called for DoRA only
at::Tensor effect(const lora::Entry& entry,
                  double multiplier,
                  const at::Tensor& x,
                  int64_t out,
                  const std::function<at::Tensor()>& weight) {
  at::Tensor y = at::zeros({x.size(0), out}, x.options());
  if (entry.module.down.defined()) {
    const at::Tensor added = apply(entry.module, x);
    if (entry.module.magnitude.defined()) {
      const at::Tensor w = weight();
      const lora::Module pair = lora::without_lokr(entry.module);
      const at::Tensor norms = (w + at::mm(wide(pair.up), wide(pair.down)) * pair.scale())
                                   .norm(2, {1})
                                   .clamp_min_(std::numeric_limits<float>::epsilon());
      const at::Tensor factor = wide(entry.module.magnitude).flatten() / norms;
      const at::Tensor plain = at::mm(x, w.t());
      y.add_((plain + added) * factor - plain);
    } else {
      y.add_(added);
    }
  }
  if (entry.diff.defined()) y.add_(at::mm(x, wide(entry.diff).t()));
  if (entry.bias.defined()) y.add_(wide(entry.bias));
  return y.mul_(multiplier);
}

LayerDifference difference_of(const std::string& path, const at::Tensor& a, const at::Tensor& b) {
  LayerDifference out{.path = path};
  if (a.defined() && b.defined()) {
    out.effect = std::max(a.norm().item<double>(), b.norm().item<double>());
    out.difference = (a - b).norm().item<double>();
  } else {
    const at::Tensor& there = a.defined() ? a : b;
    out.only = a.defined() ? "first" : "second";
    out.effect = out.difference = there.norm().item<double>();
  }
  return out;
}

std::string text_name(const lora::TextModule& module) {
  return (module.encoder == lora::TextModule::Encoder::kClip ? "clip " : "t5 ") + module.path;
}

/// Tensors that stand for themselves, and modules of text encoders applied.
std::map<std::string, at::Tensor> others(const LoraInput& input, const CheckOptions& options) {
  std::map<std::string, at::Tensor> out;
  for (const auto& [name, tensor] : input.adapters().replaced()) out[name] = wide(tensor);
  for (const auto& [name, tensor] : input.adapters().embeddings()) out[name] = wide(tensor);
  for (const auto& module : input.adapters().text_modules()) {
    const std::string name = text_name(module);
    const at::Tensor x = random({kInputs, module.down.size(1)}, options.seed, name);
    out[name] = apply({module.path, module.down, module.up, module.alpha}, x) * input.weight();
  }
  return out;
}

}  // namespace

void add_flags(CheckOptions& o, Tool& tool) {
  tool.about("Applies two LoRA files to random inputs and says whether they do the same.",
             "flux-lora check lora.safetensors lora-diffusers.safetensors");
  tool.arguments(o.files, "FILE[:WEIGHT]...", "two LoRAs in any layouts");
  tool.flag(
      "base", o.base, "FILE", "transformer for DoRA, which depends on it; none: random weights");
  tool.flag("tolerance",
            o.tolerance,
            "X",
            "largest difference of a layer's output, relative to what the LoRA adds (l2)",
            0,
            1);
  tool.flag("seed", o.seed, "S", "of the random inputs");
}

void check(const CheckOptions& o) {
  if (o.files.size() != 2)
    throw UsageError(fmt::format("{} files given, expected two", o.files.size()),
                     "flux-lora check a.safetensors b.safetensors");
  for (const std::string& file : o.files) lora::weighted_file(file);
}

CheckReport compare(const CheckOptions& options) {
  std::optional<engine::ModelFile> base;
  if (!options.base.empty())
    base.emplace(options.base, engine::ModelFileOptions{.dtype = at::kBFloat16});
  if (base && base->quant())
    throw InputError(show(options.base) + ": is quantised", "give the file that it was made of");
  std::vector<std::unique_ptr<LoraInput>> inputs;
  for (const std::string& text : options.files) {
    const auto [file, weight] = lora::weighted_file(text);
    inputs.push_back(std::make_unique<LoraInput>(
        file, base ? std::optional(base->config()) : std::nullopt, weight));
  }
  const dit::Config config = common_config(inputs);
  const auto targets = all_adapted(inputs, config);
  CheckReport report;
  report.tolerance = options.tolerance;
  Progress progress("check", "modules", std::ssize(targets));
  int64_t done = 0;
  for (const lora::Target& target : targets) {
    cancel::check();
    const at::Tensor x = random({kInputs, target.in}, options.seed, target.path);
    const auto weight = [&]() -> at::Tensor {
      if (!base)
        return random({target.out, target.in}, options.seed, target.path + ".weight") /
               std::sqrt(static_cast<double>(target.in));
      const at::Tensor tensor = at::empty({target.out, target.in}, at::kFloat);
      base->read_tensor(target.path + ".weight", tensor);
      return tensor.to(at::kDouble);
    };
    at::Tensor y[2];
    for (size_t i = 0; i < 2; ++i)
      if (inputs[i]->has(target.path))
        y[i] = effect(inputs[i]->entry(target.path), inputs[i]->weight(), x, target.out, weight);
    report.layers.push_back(difference_of(target.path, y[0], y[1]));
    for (const auto& input : inputs) input->release();
    progress.update(++done);
  }
  const auto a = others(*inputs[0], options), b = others(*inputs[1], options);
  std::set<std::string> names;
  for (const auto* map : {&a, &b})
    for (const auto& [name, tensor] : *map) names.insert(name);
  for (const std::string& name : names) {
    const auto in_a = a.find(name), in_b = b.find(name);
    const at::Tensor first = in_a == a.end() ? at::Tensor() : in_a->second,
                     second = in_b == b.end() ? at::Tensor() : in_b->second;
    if (first.defined() && second.defined() && !first.sizes().equals(second.sizes()))
      throw InputError(fmt::format("{}: {} and {}: the LoRAs are of other models",
                                   printable(name),
                                   shape_text(first),
                                   shape_text(second)));
    report.layers.push_back(difference_of(name, first, second));
  }
  double effects = 0, differences = 0;
  for (const auto& layer : report.layers) {
    effects += layer.effect * layer.effect;
    differences += layer.difference * layer.difference;
  }
  report.relative = effects > 0 ? std::sqrt(differences / effects) : 0;
  return report;
}

const LayerDifference* CheckReport::worst() const {
  const auto found = std::ranges::max_element(
      layers, {}, [](const LayerDifference& layer) { return layer.relative(); });
  return found == layers.end() ? nullptr : &*found;
}

bool CheckReport::equal() const {
  // what is not a number is not within
  return relative <= tolerance && std::ranges::all_of(layers, [&](const LayerDifference& layer) {
           return layer.relative() <= tolerance;
         });
}

std::string CheckReport::text() const {
  std::string out;
  int64_t num_beyond = 0;
  for (const auto& layer : layers) {
    if (layer.relative() <= tolerance) continue;
    if (++num_beyond > 10) continue;
    out += fmt::format("  {}: relative difference {:.3e}, effect {:.6g}{}\n",
                       printable(layer.path),
                       layer.relative(),
                       layer.effect,
                       layer.only.empty() ? "" : ", in the " + layer.only + " file only");
  }
  if (num_beyond > 10) out += fmt::format("  and {} more\n", num_beyond - 10);
  const LayerDifference* most = worst();
  return fmt::format(
      "{}: {} of {} layers differ by more than {:g}\n{}  all together {:.3e}, largest {:.3e}{}",
      equal() ? "equal" : "different",
      num_beyond,
      layers.size(),
      tolerance,
      out,
      relative,
      most ? most->relative() : 0,
      most && most->relative() > 0 ? " in " + printable(most->path) : "");
}

nlohmann::json CheckReport::json() const {
  nlohmann::json list = nlohmann::json::array();
  for (const auto& layer : layers)
    list.push_back({{"path", printable(layer.path)},
                    {"effect", layer.effect},
                    {"difference", layer.difference},
                    {"relative", layer.relative()},
                    {"only", layer.only.empty() ? nlohmann::json() : nlohmann::json(layer.only)}});
  return {{"equal", equal()},
          {"tolerance", tolerance},
          {"relative", relative},
          {"largest_relative", worst() ? worst()->relative() : 0},
          {"layers", list}};
}

}  // namespace flux::lora_tools
