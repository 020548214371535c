// Kind lora: adapter files of sd-scripts and PEFT, their effect, gradients, merged weights and
// conversion.
#include <ATen/ops/cat.h>
#include <fmt/format.h>

#include <cmath>
#include <map>
#include <optional>
#include <vector>

#include "common/core/error.h"
#include "common/models/flux/names.h"
#include "common/models/lora/lora.h"
#include "common/tensor/tensor.h"
#include "common/tensor/weight_file.h"
#include "pipelines/check/case.h"
#include "pipelines/check/transformer.h"

namespace flux::check {
namespace {

struct Context {
  const Case& c;
  const dit::Model& model;
  std::optional<dit::Inputs> inputs;  // conversion needs none

  const dit::Inputs& given_inputs() const {
    if (!inputs)
      throw InputError(
          fmt::format("{}: the forward pass that holds its inputs is not there", c.title));
    return *inputs;
  }
};

lora::Adapters load_adapters(const Context& x, const std::string& file) {
  const WeightFile weights = read_weights(x.c.folder / file);
  lora::Adapters adapters = lora::from_tensors(weights.tensors, weights.metadata, x.model.config);
  for (lora::Module& module : adapters.modules) {
    module.down = x.c.on_device(to_dtype(module.down, at::kFloat));
    module.up = x.c.on_device(to_dtype(module.up, at::kFloat));
  }
  return adapters;
}

/// "output.0.5": the velocity with the adapters at that strength.
void check_output(const Context& x,
                  const lora::Adapters& adapters,
                  const std::string& name,
                  const at::Tensor& wanted) {
  const double multiplier = std::stod(name.substr(name.rfind("output.") + 7));
  dit::Model adapted = x.model;  // shares the base tensors
  lora::attach(adapters, adapted.weights, multiplier);
  x.c.output(name, predict(adapted, x.given_inputs()), wanted);
}

/// Loss at strength 1 with gradients in downs and ups.
at::Tensor backward(const Context& x, lora::Adapters& adapters, const at::Tensor& target) {
  for (lora::Module& module : adapters.modules) {
    module.down = module.down.detach().clone().requires_grad_();
    module.up = module.up.detach().clone().requires_grad_();
  }
  dit::Model adapted = x.model;
  lora::attach(adapters, adapted.weights, 1.0);
  const at::Tensor loss =
      (dit::forward(adapted.config, adapted.weights, x.given_inputs()) - x.c.on_device(target))
          .square()
          .mean();
  loss.backward();
  return loss;
}

bool any_starts(const TensorMap& v, std::string_view beginning) {
  const auto it = v.lower_bound(std::string(beginning));
  return it != v.end() && it->first.starts_with(beginning);
}

void check_kohya(const Context& x) {
  const TensorMap v = x.c.read_tensors("kohya_vectors.safetensors");
  lora::Adapters adapters = load_adapters(x, "kohya.safetensors");
  for (const auto& [name, wanted] : v) {
    if (name.starts_with("output.")) check_output(x, adapters, name, wanted);
  }
  if (any_starts(v, "merged")) {
    dit::Model merged = x.model;
    lora::merge(adapters, merged.weights, 1.0);
    const TensorMap weights = dit::named_tensors(merged.weights),
                    before = dit::named_tensors(x.model.weights);
    const Limits within = x.c.limits("merged");
    for (const auto& [name, weight] : weights) {
      x.c.summary(v, "merged", name, weight, within, false);
      const auto stats = v.find("merged_stats." + name);
      if (stats == v.end() || stats->second.numel() < 4) continue;
      // rounding of the merged weights is relative to their size, not to the change
      const double change =
          (weight.to(at::kDouble) - before.at(name).to(at::kDouble)).norm().item<double>();
      const double golden_change = stats->second[3].item<double>(),
                   size = stats->second[0].item<double>();
      x.c.report->judge(
          "merged_change." + name, {std::abs(change - golden_change) / size, 0}, within);
    }
  }
  if (v.contains("target") && any_starts(v, "grad")) {
    const Limits within = x.c.limits("gradients");
    const at::Tensor loss = backward(x, adapters, v.at("target"));
    if (v.contains("loss")) x.c.inner("kohya loss", loss, v.at("loss"), within);
    lora::Adapters gradients = adapters;
    for (lora::Module& module : gradients.modules) {
      module.down = module.down.grad();
      module.up = module.up.grad();
    }
    for (const auto& [name, gradient] : lora::to_kohya(gradients, at::kFloat)) {
      if (!name.ends_with(".alpha")) x.c.summary(v, "grad", name, gradient, within, true);
    }
  }
}

/// Gradients of the fused adapters under the names of the PEFT tensors that they were made of.
TensorMap peft_gradients(const dit::Config& config,
                         const lora::Adapters& fused,
                         const TensorMap& file) {
  std::map<std::string, const lora::Module*> modules;
  for (const lora::Module& module : fused.modules)
    modules.emplace(module.path + ".weight", &module);
  std::map<std::string, int64_t> next_rank;  // of each fused module
  TensorMap out;
  for (const dit::DiffusersTensor& entry : dit::diffusers_layout(config)) {
    if (!entry.name.ends_with(".weight") || !modules.contains(entry.bfl)) continue;
    const std::string name =
        "transformer." +
        entry.name.substr(0, entry.name.size() - std::string_view("weight").size());
    const auto down = file.find(name + "lora_A.weight");
    if (down == file.end()) continue;
    const lora::Module& module = *modules.at(entry.bfl);
    const int64_t rank = down->second.size(0), first = next_rank[entry.bfl];
    next_rank[entry.bfl] += rank;
    at::Tensor up =
        module.up.grad().narrow(0, entry.first_row, entry.num_rows()).narrow(1, first, rank);
    if (entry.swap_halves) {
      const auto halves = up.chunk(2, 0);
      up = at::cat({halves[1], halves[0]}, 0);
    }
    out.emplace(name + "lora_A.weight", module.down.grad().narrow(0, first, rank));
    out.emplace(name + "lora_B.weight", up);
  }
  return out;
}

void check_peft(const Context& x) {
  const TensorMap v = x.c.has("peft_vectors.safetensors")
                          ? x.c.read_tensors("peft_vectors.safetensors")
                          : TensorMap{};
  for (const auto& [name, wanted] : v) {  // FILE.output.MULTIPLIER
    const size_t end = name.find(".output.");
    if (end == std::string::npos || !x.c.has(name.substr(0, end) + ".safetensors")) continue;
    check_output(x, load_adapters(x, name.substr(0, end) + ".safetensors"), name, wanted);
  }
  if (!x.c.has("peft.safetensors")) return;
  const WeightFile file = read_weights(x.c.folder / "peft.safetensors");
  if (v.contains("target") && any_starts(v, "grad")) {
    const Limits within = x.c.limits("gradients");
    lora::Adapters adapters = load_adapters(x, "peft.safetensors");
    const at::Tensor loss = backward(x, adapters, v.at("target"));
    if (v.contains("peft.loss")) x.c.inner("peft.loss", loss, v.at("peft.loss"), within);
    for (const auto& [name, gradient] : peft_gradients(x.model.config, adapters, file.tensors)) {
      x.c.summary(v, "grad", name, gradient, within, true);
    }
  }
  if (!x.c.has("peft_as_kohya.safetensors")) return;
  const TensorMap wanted = x.c.read_tensors("peft_as_kohya.safetensors");
  const auto dtype = wanted.empty() ? at::kBFloat16 : wanted.begin()->second.scalar_type();
  const TensorMap converted =
      lora::to_kohya(lora::from_tensors(file.tensors, file.metadata, x.model.config), dtype);
  for (const auto& [name, tensor] : wanted) {
    const auto it = converted.find(name);
    if (it == converted.end())
      x.c.report->verdict("peft_as_kohya " + name, false, "not among the converted tensors");
    else
      x.c.report->equal("peft_as_kohya " + name, it->second, tensor);
  }
  for (const auto& [name, tensor] : converted) {
    if (!wanted.contains(name))
      x.c.report->verdict("peft_as_kohya " + name, false, "not among the golden tensors");
  }
}

}  // namespace

void check_lora(const Case& c) {
  const dit::Model model = load_transformer(c, c.required("model", "weights_bfl.safetensors"));
  Context context{c, model, {}};
  std::error_code error;
  if (const auto inputs = c.path_of("inputs"); inputs && std::filesystem::exists(*inputs, error)) {
    context.inputs = inputs_of(c, read_weights(*inputs).tensors);
  }
  if (c.has("kohya.safetensors") && c.has("kohya_vectors.safetensors")) check_kohya(context);
  check_peft(context);
}

}  // namespace flux::check
