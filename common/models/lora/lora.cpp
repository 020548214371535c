#include "common/models/lora/lora.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <cmath>
#include <unordered_map>

#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/core/rng.h"
#include "common/tensor/memory.h"
#include "common/tensor/tensor.h"

namespace flux::lora {
namespace {

/// Calls `visit(module, layer)` for every module, in the order of the model. Throws InputError for
/// one that does not fit.
template <class Visit>
void match(const Adapters& adapters, dit::Weights& weights, const Visit& visit) {
  std::unordered_map<std::string, const Module*> by_path;
  for (const auto& module : adapters.modules) by_path[module.path] = &module;
  dit::for_each_linear(weights, [&](const std::string& path, Linear& layer) {
    const auto found = by_path.find(path);
    if (found == by_path.end()) return;
    const auto& module = *found->second;
    by_path.erase(found);
    // a streamed weight may not be there
    if (layer.weight.defined() &&
        (module.down.size(1) != layer.weight.size(1) || module.up.size(0) != layer.weight.size(0)))
      throw InputError(
          fmt::format("LoRA module {}: down {} and up {} do not fit the model's weight {}",
                      path,
                      shape_text(module.down),
                      shape_text(module.up),
                      shape_text(layer.weight)),
          "the LoRA was made for another model");
    visit(module, layer);
  });
  if (!by_path.empty())
    throw InputError(
        fmt::format("LoRA module {}: the model has no such layer", by_path.begin()->first),
        "the LoRA was made for a deeper model");
}

}  // namespace

int64_t Adapters::num_parameters() const {
  int64_t total = 0;
  for (const auto& module : modules) total += module.down.numel() + module.up.numel();
  return total;
}

Adapters make_adapters(const std::vector<Target>& targets, uint64_t seed) {
  Adapters adapters;
  for (const auto& target : targets) {
    const auto down = at::empty({target.rank, target.in}, at::kFloat);
    const RandomStream stream(seed, Purpose::kLoraInit, xxh3_64(as_bytes(target.path)));
    const double bound = 1 / std::sqrt(static_cast<double>(target.in));
    float* values = down.mutable_data_ptr<float>();
    at::parallel_for(0, down.numel(), 1 << 14, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        values[i] = static_cast<float>(bound * (2 * stream.uniform(static_cast<uint64_t>(i)) - 1));
    });
    adapters.modules.push_back(
        {target.path, down, at::zeros({target.out, target.rank}, at::kFloat), target.alpha});
  }
  return adapters;
}

Adapters empty_adapters(const std::vector<Target>& targets, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  Adapters adapters;
  for (const auto& [path, in, out, rank, alpha] : targets)
    adapters.modules.push_back(
        {path, at::empty({rank, in}, options), at::empty({out, rank}, options), alpha});
  return adapters;
}

void attach(const Adapters& adapters, dit::Weights& weights, double multiplier) {
  match(adapters, weights, [&](const Module& module, Linear& layer) {
    layer.lora = {
        module.down, module.up, multiplier * module.alpha / static_cast<double>(module.rank())};
  });
}

void limit_norm(const Module& module, double max_norm) {
  const at::NoGradGuard no_grad;
  const MemoryScope scope(MemoryCause::kKernelScratch);
  const at::Tensor down = module.down.detach(), up = module.up.detach();
  // ||up down||^2 = sum of up^T up times down down^T: two small matrices instead of one as large as the weight
  const at::Tensor products = at::mm(up.t(), up).mul_(at::mm(down, down.t()));
  const double scale = module.alpha / static_cast<double>(module.rank()) / max_norm;
  const at::Tensor factor =
      products.sum().clamp_min_(0).sqrt_().mul_(scale).clamp_min_(1).sqrt_().reciprocal_();
  up.mul_(factor);
  down.mul_(factor);
}

void detach(dit::Weights& weights) {
  dit::for_each_linear(weights, [](const std::string&, Linear& layer) { layer.lora = {}; });
}

void merge(const Adapters& adapters, dit::Weights& weights, double multiplier) {
  match(adapters, weights, [&](const Module& module, Linear& layer) {
    const auto product = at::mm(module.up.to(at::kFloat), module.down.to(at::kFloat));
    const double scale = multiplier * module.alpha / static_cast<double>(module.rank());
    layer.weight = (layer.weight.to(at::kFloat) + product * scale).to(layer.weight.scalar_type());
  });
}

}  // namespace flux::lora
