// common/models/lora/layouts.cpp - LoRA files: names of the layouts, and q, k, v adapters fused
// into one.
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/models/flux/names.h"
#include "common/models/lora/lora.h"
#include "common/tensor/tensor.h"

namespace flux::lora {
namespace {

std::string underscored(std::string path) {
  std::replace(path.begin(), path.end(), '.', '_');
  return path;
}

/// The rows of a BFL Linear that one module of a file adapts.
struct Place {
  std::string path;
  std::string diffusers;  // module path there; empty for a module of the BFL layouts
  int64_t first_row = 0, rows = 0, in = 0;
  bool swap_halves = false;
};

/// Every module name a file may use. Made forward from the model's layers: underscored names cannot
/// be read backwards.
std::map<std::string, Place> module_names(const dit::Config& config) {
  std::map<std::string, Place> out;
  for (const auto& [path, in, rows, rank, alpha] : all_targets(config)) {
    const Place place{path, "", 0, rows, in};
    out["lora_unet_" + underscored(path)] = place;
    out["diffusion_model." + path] = place;
    out["base_model.model." + path] = place;
  }
  for (const auto& tensor : dit::diffusers_layout(config)) {
    if (tensor.shape.size() != 2) continue;
    const auto module = tensor.name.substr(0, tensor.name.rfind('.'));
    const Place place{tensor.bfl.substr(0, tensor.bfl.rfind('.')),
                      module,
                      tensor.first_row,
                      tensor.num_rows(),
                      tensor.shape[1],
                      tensor.swap_halves};
    out["transformer." + module] = place;
    out["lora_transformer_" + underscored(module)] = place;
  }
  return out;
}

/// One module of a file.
struct Part {
  Place place;
  at::Tensor down, up, mix, mix_a, mix_b, magnitude;
  bool whole = false;  // LoKr's large matrix, in `down`
  std::optional<double> alpha;
  double scale = 1;  // alpha / rank
};

enum class Role { kDown, kUp, kAlpha, kWhole, kMix, kMixA, kMixB, kMagnitude };
struct Suffix {
  std::string_view text;
  Role role;
};
constexpr Suffix kSuffixes[] = {
    {".lora_down.weight", Role::kDown},
    {".lora_up.weight", Role::kUp},
    {".lora_A.weight", Role::kDown},
    {".lora_B.weight", Role::kUp},
    {".lora_A.default.weight", Role::kDown},
    {".lora_B.default.weight", Role::kUp},
    {".alpha", Role::kAlpha},
    {".lokr_w1", Role::kMix},
    {".lokr_w1_a", Role::kMixA},
    {".lokr_w1_b", Role::kMixB},
    {".lokr_w2", Role::kWhole},
    {".lokr_w2_a", Role::kUp},
    {".lokr_w2_b", Role::kDown},
    {".dora_scale", Role::kMagnitude},
};

/// Why a tensor name that no module has is refused.
std::string reason(std::string_view name) {
  struct Kind {
    std::string_view mark, reason;
  };
  constexpr Kind kKinds[] = {
      {"lokr_t", "LyCORIS (LoKr of convolutions) is not supported"},
      {"hada_", "LyCORIS (LoHa) is not supported"},
      {"oft_", "OFT is not supported"},
      {"lora_magnitude_vector", "DoRA of PEFT is not supported"},
      {".diff", "full differences of weights are not supported"},
      {".lora_B.bias", "adapters with a bias (control LoRA) are not supported"},
      {"_norm.scale", "replaced norms (control LoRA) are not supported"},
      {"processor", "XLabs adapters are not supported"},
      {"lora_te", "adapters of text encoders are not supported"},
      {"text_encoder", "adapters of text encoders are not supported"},
      {"bundle_emb", "embeddings are not supported"},
  };
  for (const auto& kind : kKinds)
    if (name.find(kind.mark) != std::string_view::npos) return std::string(kind.reason);
  return "the model has no layer of this name";
}

[[noreturn]] void refuse(std::string_view name, const std::string& why) {
  throw InputError("LoRA tensor " + printable(name) + ": " + why);
}

at::Tensor& slot_of(Part& part, Role role) {
  switch (role) {
    case Role::kUp:
      return part.up;
    case Role::kMix:
      return part.mix;
    case Role::kMixA:
      return part.mix_a;
    case Role::kMixB:
      return part.mix_b;
    case Role::kMagnitude:
      return part.magnitude;
    default:
      return part.down;
  }
}

/// LoKr's small matrix in two pieces becomes one, and its rank, which alpha is divided by, goes into the scale.
void join_mix(const std::string& module, Part& part) {
  if (!part.mix_a.defined() && !part.mix_b.defined()) return;
  if (part.mix.defined() || !part.mix_a.defined() || !part.mix_b.defined() ||
      part.mix_a.size(1) != part.mix_b.size(0))
    refuse(module, "lokr_w1, lokr_w1_a and lokr_w1_b do not fit together");
  part.mix = at::mm(part.mix_a.to(at::kFloat), part.mix_b.to(at::kFloat));
  if (part.whole && part.alpha) {
    // no other place has the rank
    part.mix.mul_(*part.alpha / static_cast<double>(part.mix_a.size(1)));
  }
}

std::map<std::string, Part> read_parts(const TensorMap& tensors, const dit::Config& config) {
  const auto names = module_names(config);
  std::map<std::string, Part> parts;
  for (const auto& [name, tensor] : tensors) {
    const auto suffix = std::find_if(std::begin(kSuffixes),
                                     std::end(kSuffixes),
                                     [&](const Suffix& s) { return name.ends_with(s.text); });
    if (suffix == std::end(kSuffixes)) refuse(name, reason(name));
    const auto module = name.substr(0, name.size() - suffix->text.size());
    const auto place = names.find(module);
    if (place == names.end()) refuse(name, reason(name));
    auto& part = parts[module];
    part.place = place->second;
    if (suffix->role == Role::kAlpha) {
      if (tensor.numel() != 1)
        refuse(name, "alpha has shape " + shape_text(tensor) + ", expected one number");
      part.alpha = tensor.to(at::kDouble).item<double>();
      continue;
    }
    auto& slot = slot_of(part, suffix->role);
    if (slot.defined()) refuse(name, "a second pair for the same layer");
    if (suffix->role == Role::kWhole) part.whole = true;
    if (tensor.dim() != 2 || !tensor.is_floating_point())
      refuse(name, "shape " + shape_text(tensor) + " is no matrix of floats");
    slot = tensor;
  }
  for (auto& [module, part] : parts) {
    const auto& place = part.place;
    join_mix(module, part);
    const bool lokr = part.mix.defined();
    if (!part.down.defined() || part.up.defined() == part.whole || (part.whole && !lokr))
      refuse(module, "half of the pair down, up is missing");
    const at::Tensor& last = part.whole ? part.down : part.up;
    if (part.down.size(1) * (lokr ? part.mix.size(1) : 1) != place.in ||
        last.size(0) * (lokr ? part.mix.size(0) : 1) != place.rows ||
        (!part.whole && part.up.size(1) != part.down.size(0)) || part.down.size(0) == 0)
      refuse(module,
             fmt::format("down {} and up {} do not fit a layer {}",
                         shape_text(part.down),
                         shape_text(last),
                         shape_text(std::vector<int64_t>{place.rows, place.in})));
    if (part.magnitude.defined() &&
        (part.magnitude.size(0) != place.rows || part.magnitude.size(1) != 1))
      refuse(
          module + ".dora_scale",
          fmt::format("shape {}, expected {} (norms of rows; those of columns are not supported)",
                      shape_text(part.magnitude),
                      shape_text(std::vector<int64_t>{place.rows, 1})));
  }
  return parts;
}

/// lora_alpha and r of PEFT's configuration, for one module.
class PeftConfig {
 public:
  explicit PeftConfig(const Metadata& metadata) {
    const auto found = metadata.find("lora_adapter_metadata");
    if (found == metadata.end()) return;
    config_ = nlohmann::json::parse(found->second, nullptr, /*allow_exceptions=*/false);
    if (!config_.is_object())
      throw InputError("LoRA metadata lora_adapter_metadata is not a JSON object");
    for (const char* option : {"use_dora", "lora_bias"})
      if (const auto* value = find(option); value && value->is_boolean() && value->get<bool>())
        throw InputError(fmt::format("LoRA metadata: {} is not supported", option));
  }

  /// alpha / rank of `module`, 1 where the file says nothing.
  double scale(const std::string& module, int64_t rank) const {
    const auto* given = find("lora_alpha");
    if (!given) return 1;
    double alpha = number("lora_alpha", *given);
    if (const auto* patterns = find("alpha_pattern"); patterns && patterns->is_object())
      for (const auto& [pattern, value] : patterns->items())
        if (matches(module, pattern)) alpha = number("alpha_pattern", value);
    const auto* rs = find("use_rslora");
    const auto r = static_cast<double>(rank);
    return alpha / (rs && rs->is_boolean() && rs->get<bool>() ? std::sqrt(r) : r);
  }

 private:
  const nlohmann::json* find(const std::string& key) const {
    const auto found = config_.find("transformer." + key);
    return found == config_.end() ? nullptr : &*found;
  }
  static double number(const char* key, const nlohmann::json& value) {
    if (!value.is_number()) throw InputError(fmt::format("LoRA metadata: {} is not a number", key));
    return value.get<double>();
  }
  /// PEFT reads a key as a regular expression for the end of a module path; plain paths are what
  /// files hold.
  static bool matches(const std::string& module, const std::string& pattern) {
    if (pattern.find_first_of("*+?[](){}|^$\\") != std::string::npos)
      throw InputError("LoRA metadata: alpha_pattern with the regular expression " +
                       printable(pattern) + " is not supported");
    return module == pattern || module.ends_with("." + pattern);
  }
  nlohmann::json config_ = nlohmann::json::object();
};

at::Tensor swap_halves(const at::Tensor& rows) {
  const auto halves = rows.chunk(2, 0);
  return at::cat({halves[1], halves[0]}, 0);
}

/// One module from the parts of one Linear, exactly: downs stacked, ups on the diagonal.
Module fuse(const Target& target, std::vector<Part> parts) {
  std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) {
    return a.place.first_row < b.place.first_row;
  });
  const bool one_scale = std::all_of(
      parts.begin(), parts.end(), [&](const Part& p) { return p.scale == parts[0].scale; });
  std::vector<at::Tensor> downs;
  int64_t rank = 0, covered = 0;
  for (auto& part : parts) {
    if (part.place.first_row < covered) refuse(target.path, "two pairs for the same rows");
    covered = part.place.first_row + part.place.rows;
    if (part.place.swap_halves) {
      if (part.mix.defined() || part.magnitude.defined())
        refuse(target.path, "LoKr and DoRA in diffusers' order of rows are not supported");
      part.up = swap_halves(part.up);
    }
    if (!one_scale && part.up.defined()) part.up = part.up.to(at::kFloat) * part.scale;
    downs.push_back(part.down);
    rank += part.down.size(0);
  }
  const double scale = one_scale ? parts[0].scale : 1;
  Module module{target.path, parts[0].down, parts[0].up, scale * static_cast<double>(rank)};
  module.mix = parts[0].mix;
  module.magnitude = parts[0].magnitude;
  if (parts.size() > 1 || parts[0].place.rows != target.out) {
    for (const Part& part : parts)
      if (part.mix.defined() || part.magnitude.defined())
        refuse(target.path, "LoKr and DoRA of a part of the layer are not supported");
    module.down = at::cat(downs, 0);
    module.up = at::zeros({target.out, rank}, parts[0].up.options());
    int64_t column = 0;
    for (const auto& part : parts) {
      module.up.narrow(0, part.place.first_row, part.place.rows)
          .narrow(1, column, part.down.size(0))
          .copy_(part.up);
      column += part.down.size(0);
    }
  }
  return module;
}

}  // namespace

TensorMap to_kohya(const Adapters& adapters, at::ScalarType dtype) {
  TensorMap out;
  for (const auto& module : adapters.modules) {
    const auto name = "lora_unet_" + underscored(module.path);
    const auto add = [&](const char* suffix, const at::Tensor& tensor) {
      out[name + suffix] = tensor.detach().to(dtype);
    };
    const bool lokr = module.mix.defined();
    if (lokr) add(".lokr_w1", module.mix);
    if (module.up.defined()) {
      add(lokr ? ".lokr_w2_b" : ".lora_down.weight", module.down);
      add(lokr ? ".lokr_w2_a" : ".lora_up.weight", module.up);
    } else {
      add(".lokr_w2", module.down);
    }
    if (module.magnitude.defined())
      out[name + ".dora_scale"] = module.magnitude.detach().to(at::kFloat);
    // alpha has the dtype of the rest, as sd-scripts saves it, unless that would change it
    const auto alpha = at::full({}, module.alpha, at::kFloat);
    const bool exact = alpha.to(dtype).item<float>() == alpha.item<float>();
    out[name + ".alpha"] = exact ? alpha.to(dtype) : alpha;
  }
  return out;
}

Adapters from_tensors(const TensorMap& tensors,
                      const Metadata& metadata,
                      const dit::Config& config) {
  const PeftConfig peft(metadata);
  std::map<std::string, std::vector<Part>> by_path;
  for (auto& [module, part] : read_parts(tensors, config)) {
    const int64_t rank = part.down.size(0);
    const bool is_peft = !part.alpha && !part.place.diffusers.empty();
    if (part.alpha) part.scale = *part.alpha / static_cast<double>(rank);
    if (is_peft) part.scale = peft.scale(part.place.diffusers, rank);
    by_path[part.place.path].push_back(part);
  }
  if (by_path.empty())
    throw InputError("the file holds no LoRA", "give a LoRA of a FLUX transformer");
  Adapters adapters;
  for (const auto& target : all_targets(config))
    if (const auto found = by_path.find(target.path); found != by_path.end())
      adapters.modules.push_back(fuse(target, std::move(found->second)));
  return adapters;
}

}  // namespace flux::lora
