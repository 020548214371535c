#include "common/models/lora/lora.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <unordered_map>

#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/core/rng.h"
#include "common/ops/adapter.h"
#include "common/tensor/memory.h"
#include "common/tensor/tensor.h"

namespace flux::lora {
namespace {

int64_t columns(const Module& m) { return m.down.size(1) * (m.mix.defined() ? m.mix.size(1) : 1); }
int64_t rows(const Module& m) {
  return (m.up.defined() ? m.up : m.down).size(0) * (m.mix.defined() ? m.mix.size(0) : 1);
}

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
        (columns(module) != layer.weight.size(1) || rows(module) != layer.weight.size(0))) {
      const at::Tensor& up = module.up.defined() ? module.up : module.mix;
      throw InputError(
          fmt::format("LoRA module {}: down {} and up {} do not fit the model's weight {}",
                      path,
                      shape_text(module.down),
                      shape_text(up),
                      shape_text(layer.weight)),
          "the LoRA was made for another model");
    }
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
  for (const auto& module : modules)
    for (const at::Tensor* part : module.parts())
      if (part->defined()) total += part->numel();
  return total;
}

double Module::scale() const {
  return mix.defined() && !up.defined() ? 1 : alpha / static_cast<double>(rank());
}

namespace {

/// Uniform in +-1/sqrt(columns).
void draw(const at::Tensor& tensor, uint64_t seed, const std::string& name) {
  const RandomStream stream(seed, Purpose::kLoraInit, xxh3_64(as_bytes(name)));
  const double bound = 1 / std::sqrt(static_cast<double>(tensor.size(1)));
  float* values = tensor.mutable_data_ptr<float>();
  at::parallel_for(0, tensor.numel(), 1 << 14, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      values[i] = static_cast<float>(bound * (2 * stream.uniform(static_cast<uint64_t>(i)) - 1));
  });
}

}  // namespace

Adapters make_adapters(const std::vector<Target>& targets, uint64_t seed, const Form& form) {
  Adapters adapters = empty_adapters(targets, at::kCPU, form);
  for (Module& module : adapters.modules) {
    // a whole down is what is zero at the start
    if (module.up.defined()) {
      module.up.zero_();
      draw(module.down, seed, module.path);
    } else {
      module.down.zero_();
    }
    if (module.mix.defined()) draw(module.mix, seed, module.path + ".mix");
    if (module.magnitude.defined()) module.magnitude.fill_(1);
  }
  return adapters;
}

Adapters empty_adapters(const std::vector<Target>& targets, at::Device device, const Form& form) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  Adapters adapters;
  for (const Target& target : targets) {
    Module module{target.path, {}, {}, target.alpha};
    for (const auto& [part, shape] : part_shapes(target, form))
      *module.parts()[part] = at::empty(shape, options);
    adapters.modules.push_back(std::move(module));
  }
  return adapters;
}

namespace {

LowRank low_rank(const Module& module, double multiplier) {
  return {.down = module.down,
          .up = module.up,
          .scale = multiplier * module.scale(),
          .mix = module.mix,
          .magnitude = module.magnitude};
}

}  // namespace

void attach(const Adapters& adapters, dit::Weights& weights, double multiplier) {
  match(adapters, weights, [&](const Module& module, Linear& layer) {
    if (module.magnitude.defined() && multiplier != 1)
      throw std::invalid_argument("attach: magnitudes with another multiplier than 1");
    layer.lora = low_rank(module, multiplier);
  });
}

void attach_beside(const Adapters& adapters, dit::Weights& weights, double multiplier) {
  match(adapters, weights, [&](const Module& module, Linear& layer) {
    layer.added.push_back({low_rank(module, 1), multiplier});
  });
}

void set_magnitude(const Linear& layer, at::ScalarType type) {
  if (!layer.lora.magnitude.defined()) return;
  const at::NoGradGuard no_grad;
  layer.lora.magnitude.copy_(row_norms(layer, type).view({-1, 1}));
}

void limit_norm(const Module& module, double max_norm) {
  const at::NoGradGuard no_grad;
  const MemoryScope scope(MemoryCause::kKernelScratch);
  const at::Tensor down = module.down.detach();
  std::vector<at::Tensor> factors{down};
  at::Tensor squares;
  if (module.up.defined()) {
    // ||up down||^2 = sum of up^T up times down down^T: two small matrices instead of one as large as the weight
    const at::Tensor up = module.up.detach();
    squares = at::mm(up.t(), up).mul_(at::mm(down, down.t())).sum();
    factors.push_back(up);
  } else {
    squares = down.norm().square_();
  }
  if (module.mix.defined()) {  // ||kron(a, b)|| = ||a|| ||b||
    factors.push_back(module.mix.detach());
    squares.mul_(factors.back().norm().square_());
  }
  const double scale = module.scale() / max_norm;
  const at::Tensor factor = squares.clamp_min_(0).sqrt_().mul_(scale).clamp_min_(1).pow_(
      -1.0 / static_cast<double>(factors.size()));
  for (const at::Tensor& f : factors) f.mul_(factor);
}

void detach(dit::Weights& weights) {
  dit::for_each_linear(weights, [](const std::string&, Linear& layer) {
    layer.lora = {};
    layer.added.clear();
  });
}

void merge(const Adapters& adapters, dit::Weights& weights, double multiplier) {
  match(adapters, weights, [&](const Module& module, Linear& layer) {
    const at::NoGradGuard no_grad;
    LowRank low_rank{.down = module.down.to(at::kFloat),
                     .up = module.up.defined() ? module.up.to(at::kFloat) : at::Tensor(),
                     .scale = multiplier * module.scale(),
                     .mix = module.mix.defined() ? module.mix.to(at::kFloat) : at::Tensor()};
    const bool dora = module.magnitude.defined();
    if (dora) low_rank.scale = module.scale();
    const at::Tensor before = layer.weight.to(at::kFloat);
    const at::Tensor merged = before.clone();
    const int64_t most = delta_rows(merged.size(1), low_rank);
    for (int64_t first = 0; first < merged.size(0); first += most)
      add_delta(merged.narrow(0, first, std::min(most, merged.size(0) - first)), first, low_rank);
    if (dora) {
      merged.mul_(
          module.magnitude.to(at::kFloat) /
          merged.norm(2, {1}, /*keepdim=*/true).clamp_min_(std::numeric_limits<float>::epsilon()));
      if (multiplier != 1) merged.sub_(before).mul_(multiplier).add_(before);
    }
    layer.weight = merged.to(layer.weight.scalar_type());
  });
}

}  // namespace flux::lora
