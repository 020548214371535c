// Kind train: short training runs with every random number written down, replayed update by update.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <fmt/format.h>

#include <cmath>
#include <utility>
#include <vector>

#include "common/core/error.h"
#include "common/models/lora/lora.h"
#include "common/optim/adamw.h"
#include "common/tensor/tensor.h"
#include "common/train/flow_loss.h"
#include "common/train/gradient_clip.h"
#include "pipelines/check/case.h"
#include "pipelines/check/transformer.h"

namespace flux::check {
namespace {

/// One run: what it trains, and what it leaves.
struct Run {
  std::string name;
  int64_t accumulate = 1;
  dit::Model model;
  TensorMap parameters;  // leaves, updated in place
  TensorMap start;       // copies of them before the first update
};

template <class T>
T setting(const Case& c, const char* key, T fallback) {
  return c.config.contains(key) ? c.config[key].get<T>() : fallback;
}

/// Loss of batch `step`, as in training.
at::Tensor batch_loss(const Case& c, const dit::Model& model, const TensorMap& data, int64_t step) {
  const at::Tensor index = golden(data, "index")[step];
  const auto rows = [&](const char* name) {
    return c.on_device(golden(data, name).index_select(0, index));
  };
  return flow_loss(model.config,
                   model.weights,
                   LossOptions{},
                   {.latents = rows("latents"),
                    .noise = c.on_device(golden(data, "noise")[step]),
                    .sigma = c.on_device(golden(data, "sigma")[step]),
                    .prompt_embedding = rows("txt"),
                    .pooled_embedding = rows("y"),
                    .guidance = setting(c, "guidance", 1.0)});
}

void replay(const Case& c,
            const TensorMap& data,
            Run& run,
            std::vector<at::Tensor>& losses,
            std::vector<double>& norms) {
  const auto betas = setting(c, "betas", std::vector<double>{0.9, 0.999});
  const AdamWOptions adamw{
      betas.at(0), betas.at(1), setting(c, "eps", 1e-8), setting(c, "weight_decay", 0.01)};
  const double learning_rate = setting(c, "lr", 1e-3), max_norm = setting(c, "clip_norm", 1.0);
  struct Moments {
    at::Tensor first, second;
  };
  std::vector<std::pair<at::Tensor, Moments>> state;
  for (const auto& [name, parameter] : run.parameters) {
    const at::Tensor plain = parameter.detach();
    state.push_back({parameter, {at::zeros_like(plain), at::zeros_like(plain)}});
  }
  for (int64_t step = 0; step < golden(data, "index").size(0); ++step) {
    const at::Tensor loss = batch_loss(c, run.model, data, step);
    (loss / run.accumulate).backward();
    losses.push_back(loss.detach().cpu());
    if ((step + 1) % run.accumulate != 0) continue;
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> gradients;
    for (const auto& [parameter, moments] : state)
      gradients.push_back(parameter.grad().contiguous());
    norms.push_back(clip_global_norm(gradients, max_norm));
    for (size_t i = 0; i < state.size(); ++i) {
      auto& [parameter, moments] = state[i];
      adamw_step(parameter.detach(),
                 gradients[i],
                 moments.first,
                 moments.second,
                 learning_rate,
                 adamw,
                 static_cast<int64_t>(norms.size()));
      parameter.mutable_grad().reset();
    }
  }
}

void check_run(const Case& c, const TensorMap& data, Run& run) {
  const TensorMap v = c.read_tensors(run.name + ".safetensors");
  for (const auto& [name, parameter] : run.parameters)
    run.start.emplace(name, parameter.detach().clone());
  std::vector<at::Tensor> losses;
  std::vector<double> norms;
  replay(c, data, run, losses, norms);
  const std::string label = run.name + " ";
  if (v.contains("loss"))
    c.report->compare(label + "loss", at::stack(losses), v.at("loss"), c.limits("loss"));
  if (v.contains("grad_norm"))
    c.report->compare(
        label + "grad_norm", at::tensor(norms), v.at("grad_norm"), c.limits("grad_norm"));

  int64_t num_samples = 0, num_beyond = 0;
  double largest = 0;
  for (const auto& [name, parameter] : run.parameters) {
    const at::Tensor value = parameter.detach().cpu();
    if (const auto it = v.find("final_samples." + name); it != v.end()) {
      const double usual = c.limit("final_samples", "abs"),
                   most = c.limit("final_samples", "abs_beyond");
      const auto off =
          (samples_of(value, it->second.numel()).view(it->second.sizes()).to(at::kDouble) -
           it->second.to(at::kDouble))
              .abs();
      const double worst = off.max().item<double>();
      num_samples += off.numel();
      num_beyond += (off > usual).sum().item<int64_t>();
      largest = std::max(largest, worst);
      c.report->verdict(label + "final_samples." + name,
                        worst <= most,
                        fmt::format("abs {:.1e} of {:.1e}, few of {:.1e}", worst, usual, most));
    }
    if (const auto it = v.find("final_stats." + name); it != v.end()) {
      const auto exact = value.to(at::kDouble), before = run.start.at(name).cpu().to(at::kDouble),
                 wanted = it->second.to(at::kDouble);
      const auto relative = [&](int64_t i, double got) {
        return std::abs(got - wanted[i].item<double>()) / std::abs(wanted[i].item<double>());
      };
      const double norm = relative(0, exact.norm().item<double>()),
                   most = relative(2, exact.abs().max().item<double>());
      const double change =
          wanted.numel() > 3 ? relative(3, (exact - before).norm().item<double>()) : 0;
      const double limit = c.limit("final_stats", "rel"),
                   change_limit = c.limit("final_stats", "change_rel");
      c.report->verdict(label + "final_stats." + name,
                        norm <= limit && most <= limit && change <= change_limit,
                        fmt::format("norm {:.1e} largest {:.1e} of {:.1e}  change {:.1e} of {:.1e}",
                                    norm,
                                    most,
                                    limit,
                                    change,
                                    change_limit));
    }
  }
  if (num_samples == 0) return;
  const double share = static_cast<double>(num_beyond) / static_cast<double>(num_samples),
               allowed = c.limit("final_samples", "allowed_beyond");
  c.report->verdict(label + "final_samples",
                    share <= allowed,
                    fmt::format("{} of {} samples beyond {:.1e}, {:.2g} % allowed; largest {:.1e}",
                                num_beyond,
                                num_samples,
                                c.limit("final_samples", "abs"),
                                100 * allowed,
                                largest));
}

/// "lora_unet_double_blocks_0_img_attn_qkv".
std::string kohya_name(const lora::Module& module) {
  const std::string name = lora::to_kohya({.modules = {module}}, at::kFloat).begin()->first;
  return name.substr(0, name.find('.'));
}

/// Adapters as they start: downs and alphas of the file, ups at zero.
lora::Adapters starting_adapters(const Case& c, const dit::Config& config) {
  TensorMap start = c.read_tensors("lora_start.safetensors");
  for (const lora::Target& target : lora::all_targets(config)) {
    const std::string name =
        kohya_name({target.path, at::zeros({1, target.in}), at::zeros({target.out, 1}), 1});
    const auto down = start.find(name + ".lora_down.weight");
    if (down == start.end()) continue;
    start.try_emplace(name + ".lora_up.weight",
                      at::zeros({target.out, down->second.size(0)}, down->second.scalar_type()));
  }
  lora::Adapters adapters = lora::from_tensors(start, {}, config);
  for (lora::Module& module : adapters.modules) {
    for (at::Tensor* tensor : {&module.down, &module.up}) {
      *tensor = c.on_device(tensor->to(at::kFloat, false, /*copy=*/true)).requires_grad_();
    }
  }
  return adapters;
}

}  // namespace

void check_train(const Case& c) {
  const auto path = c.required("model", "weights_bfl.safetensors");
  const TensorMap data = c.read_tensors("data.safetensors");
  if (data.empty()) return;
  for (const char* name : {"full", "accumulate"}) {
    if (!c.has(std::string(name) + ".safetensors")) continue;
    Run run{name,
            std::string_view(name) == "full" ? 1 : setting(c, "accumulate", int64_t{2}),
            load_transformer(c, path),
            {},
            {}};
    run.parameters = make_leaves(run.model.weights);
    check_run(c, data, run);
  }
  if (c.has("lora.safetensors") && c.has("lora_start.safetensors")) {
    Run run{"lora", 1, load_transformer(c, path), {}, {}};
    const lora::Adapters adapters = starting_adapters(c, run.model.config);
    lora::attach(adapters, run.model.weights, 1.0);
    for (const lora::Module& module : adapters.modules) {  // under their names in a file
      run.parameters.emplace(kohya_name(module) + ".lora_down.weight", module.down);
      run.parameters.emplace(kohya_name(module) + ".lora_up.weight", module.up);
    }
    check_run(c, data, run);
  }
}

}  // namespace flux::check
