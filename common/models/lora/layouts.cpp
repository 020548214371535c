#include "common/models/lora/layouts.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/kron.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "common/core/error.h"
#include "common/core/file.h"
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

std::string module_of(const std::string& tensor_name) {
  return tensor_name.substr(0, tensor_name.rfind('.'));
}

[[noreturn]] void refuse(std::string_view name, const std::string& why) {
  throw InputError("LoRA tensor " + printable(name) + ": " + why);
}

[[noreturn]] void refuse_module(std::string_view path, const std::string& why) {
  throw InputError(fmt::format("LoRA module {}: {}", printable(path), why));
}

at::Tensor swap_halves(const at::Tensor& rows) {
  const auto halves = rows.chunk(2, 0);
  return at::cat({halves[1], halves[0]}, 0);
}

// --- names

/// The rows of a BFL Linear that one module of a file adapts.
struct Place {
  std::string path;
  std::string diffusers;  // module path there; empty for a module of the BFL layouts
  int64_t first_row = 0, rows = 0, in = 0;
  bool swap_halves = false;
  Layout layout = Layout::kSdScripts;  // of the name
};
using Places = std::map<std::string, Place>;

/// Names of XLabs' processors: of the image stream, and the text stream.
std::optional<std::string> xlabs_name(const std::string& path) {
  constexpr std::pair<std::string_view, std::string_view> kEnds[] = {
      {"img_attn.qkv", "processor.qkv_lora1"},
      {"txt_attn.qkv", "processor.qkv_lora2"},
      {"img_attn.proj", "processor.proj_lora1"},
      {"txt_attn.proj", "processor.proj_lora2"},
      {"linear1", "processor.qkv_lora"},
      {"linear2", "processor.proj_lora"}};
  for (const auto& [end, name] : kEnds)
    if (path.ends_with(end) && path.find("_blocks.") != std::string::npos)
      return path.substr(0, path.size() - end.size()) + std::string(name);
  return std::nullopt;
}

/// Rows of `target` that XLabs adapts: of linear1 those of q, k and v.
int64_t xlabs_rows(const Target& target, const dit::Config& config) {
  return target.path.ends_with(".linear1") ? 3 * config.hidden : target.out;
}

/// Every module name that a file may use. Made forward from the model's layers: underscored names cannot be read
/// backwards.
Places module_names(const dit::Config& config) {
  Places out;
  for (const Target& target : all_targets(config)) {
    const std::string& path = target.path;
    const auto add = [&](const std::string& name, Layout layout) {
      out[name] = {path, "", 0, target.out, target.in, false, layout};
    };
    add("lora_unet_" + underscored(path), Layout::kSdScripts);
    add("diffusion_model." + path, Layout::kComfyUi);
    add("base_model.model." + path, Layout::kFal);
    add(path, Layout::kControl);
    if (const auto name = xlabs_name(path))
      for (const char* prefix : {"", "diffusion_model."})
        out[prefix + *name] = {
            path, "", 0, xlabs_rows(target, config), target.in, false, Layout::kXlabs};
  }
  for (const auto& tensor : dit::diffusers_layout(config)) {
    if (tensor.shape.size() != 2) continue;
    const auto module = module_of(tensor.name);
    Place place{module_of(tensor.bfl),
                module,
                tensor.first_row,
                tensor.num_rows(),
                tensor.shape[1],
                tensor.swap_halves,
                Layout::kDiffusers};
    for (const char* prefix :
         {"transformer.", "", "base_model.model.", "base_model.model.transformer."})
      out[prefix + module] = place;
    place.layout = Layout::kMixture;
    out["lora_transformer_" + underscored(module)] = place;
  }
  return out;
}

/// Tensors that a file may replace, the norms of q and k: BFL name by the file's.
std::map<std::string, std::string> replaced_names(const dit::Config& config) {
  std::map<std::string, std::string> out;
  for (const auto& [name, shape] : dit::tensor_shapes(config)) {
    if (!name.ends_with(".scale")) continue;
    out[name] = name;
    out["diffusion_model." + name + ".set_weight"] = name;
  }
  for (const auto& tensor : dit::diffusers_layout(config))
    if (tensor.bfl.ends_with(".scale")) out["transformer." + tensor.name] = tensor.bfl;
  return out;
}

using Encoder = TextModule::Encoder;
constexpr int64_t kMaxTextLayers = 64;

/// What stands before a text encoder's module in names of a layout; nothing where it has none.
std::optional<std::string_view> text_prefix(Layout layout, Encoder encoder) {
  const bool clip = encoder == Encoder::kClip;
  switch (layout) {
    case Layout::kSdScripts:
    case Layout::kMixture:
      return clip ? "lora_te1_" : "lora_te3_";
    case Layout::kOneTrainer:
      return clip ? "lora_te1_" : "lora_te2_";
    case Layout::kDiffusers:
      return clip ? "text_encoder." : "text_encoder_2.";
    case Layout::kComfyUi:
      return clip ? "text_encoders.clip_l.transformer." : "text_encoders.t5xxl.transformer.";
    case Layout::kXlabs:
    case Layout::kControl:
    case Layout::kFal:
      return std::nullopt;
  }
  return std::nullopt;
}

std::vector<std::string> text_paths(Encoder encoder) {
  std::vector<std::string> out;
  for (int64_t i = 0; i < kMaxTextLayers; ++i) {
    if (encoder == Encoder::kClip) {
      for (const char* end : {"self_attn.q_proj",
                              "self_attn.k_proj",
                              "self_attn.v_proj",
                              "self_attn.out_proj",
                              "mlp.fc1",
                              "mlp.fc2"})
        out.push_back(fmt::format("text_model.encoder.layers.{}.{}", i, end));
    } else {
      for (const char* end : {"0.SelfAttention.q",
                              "0.SelfAttention.k",
                              "0.SelfAttention.v",
                              "0.SelfAttention.o",
                              "1.DenseReluDense.wi_0",
                              "1.DenseReluDense.wi_1",
                              "1.DenseReluDense.wo"})
        out.push_back(fmt::format("encoder.block.{}.layer.{}", i, end));
    }
  }
  return out;
}

struct TextPlace {
  Encoder encoder = Encoder::kClip;
  std::string path;
  Layout layout = Layout::kSdScripts;
};

/// By module name in a file.
std::map<std::string, TextPlace> text_names() {
  std::map<std::string, TextPlace> out;
  for (const Encoder encoder : {Encoder::kClip, Encoder::kT5})
    for (const std::string& path : text_paths(encoder))
      for (const Layout layout :
           {Layout::kOneTrainer, Layout::kSdScripts, Layout::kDiffusers, Layout::kComfyUi}) {
        const std::string prefix(*text_prefix(layout, encoder));
        out[prefix + (prefix.ends_with('_') ? underscored(path) : path)] = {encoder, path, layout};
      }
  return out;
}

// --- what a file holds

enum class Role {
  kDown,
  kUp,
  kAlpha,
  kWhole,
  kMix,
  kMixA,
  kMixB,
  kMagnitude,
  kDiff,
  kBias,
  kScaledBias,
  kReshape
};
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
    {".down.weight", Role::kDown},
    {".up.weight", Role::kUp},
    {".alpha", Role::kAlpha},
    {".lokr_w1", Role::kMix},
    {".lokr_w1_a", Role::kMixA},
    {".lokr_w1_b", Role::kMixB},
    {".lokr_w2", Role::kWhole},
    {".lokr_w2_a", Role::kUp},
    {".lokr_w2_b", Role::kDown},
    {".dora_scale", Role::kMagnitude},
    {".lora_magnitude_vector", Role::kMagnitude},
    {".lora_magnitude_vector.weight", Role::kMagnitude},
    {".lora_magnitude_vector.default.weight", Role::kMagnitude},
    {".diff", Role::kDiff},
    {".diff_b", Role::kBias},
    {".lora_B.bias", Role::kScaledBias},
    {".lora_B.default.bias", Role::kScaledBias},
    {".reshape_weight", Role::kReshape},
};
constexpr std::string_view kEmbedding = "bundle_emb.";

/// One module of a file.
struct Part {
  Place place;
  at::Tensor down, up, mix, mix_a, mix_b, magnitude, diff, bias, reshape;
  bool whole = false;        // LoKr's large matrix, in `down`
  bool scaled_bias = false;  // the bias is to be multiplied by the scale
  std::optional<double> alpha;
  double scale = 1;  // alpha / rank

  bool has_pair() const { return down.defined(); }
};

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
    case Role::kDiff:
      return part.diff;
    case Role::kBias:
    case Role::kScaledBias:
      return part.bias;
    case Role::kReshape:
      return part.reshape;
    case Role::kAlpha:
    case Role::kWhole:
    case Role::kDown:
      break;
  }
  return part.down;
}

/// Why a tensor name that no module has is refused.
std::string reason(std::string_view name) {
  struct Kind {
    std::string_view mark, reason;
  };
  constexpr Kind kKinds[] = {
      {"lokr_t", "LyCORIS (LoKr of convolutions) is not supported"},
      {"hada_", "LyCORIS (LoHa) is not supported"},
      {"oft_", "OFT is not supported"},
      {"lora_mid", "LyCORIS (LoCon of convolutions) is not supported"},
      {"lora_te2_text", "adapters of a second CLIP are not supported: FLUX has none"},
      {"lora_te", "text encoders of FLUX have no layer of this name"},
      {"text_encoder", "text encoders of FLUX have no layer of this name"},
  };
  for (const auto& kind : kKinds)
    if (name.find(kind.mark) != std::string_view::npos) return std::string(kind.reason);
  return "the model has no layer of this name";
}

double read_alpha(const std::string& name, const at::Tensor& tensor) {
  if (tensor.numel() != 1)
    refuse(name, "alpha has shape " + shape_text(tensor) + ", expected one number");
  const double alpha = tensor.to(at::kDouble).item<double>();
  if (!std::isfinite(alpha)) refuse(name, "alpha is not a finite number");
  return alpha;
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

/// Number of blocks that the names of a file tell: 1 + the largest index behind a word.
void count_blocks(const TensorMap& tensors, dit::Config& config) {
  constexpr int64_t kMostBlocks = 4096;
  for (const auto& [name, tensor] : tensors) {
    const auto word = name.find("_blocks");
    if (word == std::string::npos) continue;
    const size_t digits = word + std::string_view("_blocks").size() + 1;
    int64_t index = -1;
    for (size_t i = digits; i < name.size() && name[i] >= '0' && name[i] <= '9'; ++i) {
      index = 10 * std::max<int64_t>(index, 0) + (name[i] - '0');
      if (index >= kMostBlocks)
        refuse(name, fmt::format("models of more than {} blocks are not supported", kMostBlocks));
    }
    const std::string_view before = std::string_view(name).substr(0, word);
    const bool single = before.ends_with("single") || before.ends_with("single_transformer");
    auto& count = single ? config.num_single_blocks : config.num_double_blocks;
    count = std::max(count, index + 1);
  }
}

/// Sizes of the model, each a digit to the base 100, so that any size of a layer reads as the sum it is.
dit::Config symbolic(dit::Config config) {
  config.hidden = config.num_heads = 1;
  config.mlp = 100;
  config.in_channels = 10'000;
  config.out_channels = 1'000'000;
  config.prompt_dim = 100'000'000;
  config.pooled_dim = 10'000'000'000;
  config.sinusoid_dim = 1'000'000'000'000;
  return config;
}

/// The config whose layers have the sizes that the modules of a file have.
dit::Config infer_config(const dit::Config& blocks,
                         const std::map<std::string, Part>& parts,
                         const TensorMap& replaced) {
  std::vector<std::pair<int64_t, int64_t>> equations;  // a sum of symbols, its value
  for (const auto& [name, part] : parts) {
    const int64_t a = part.mix.defined() ? part.mix.size(0) : 1,
                  c = part.mix.defined() ? part.mix.size(1) : 1;
    if (part.down.defined()) equations.emplace_back(part.place.in, part.down.size(1) * c);
    if (part.up.defined())
      equations.emplace_back(part.place.rows, part.up.size(0) * a);
    else if (part.whole)
      equations.emplace_back(part.place.rows, part.down.size(0) * a);
    if (part.diff.defined()) {
      equations.emplace_back(part.place.rows, part.diff.size(0));
      equations.emplace_back(part.place.in, part.diff.size(1));
    }
    if (part.bias.defined()) equations.emplace_back(part.place.rows, part.bias.size(0));
  }
  std::map<size_t, int64_t> known;  // by digit
  for (int round = 0; round < 3; ++round)
    for (auto [symbols, value] : equations) {
      std::optional<size_t> unknown;
      int64_t factor = 0;
      bool several = false;
      for (size_t digit = 0; symbols > 0; ++digit, symbols /= 100) {
        const int64_t count = symbols % 100;
        if (count == 0) continue;
        if (const auto found = known.find(digit); found != known.end()) {
          value -= count * found->second;
        } else {
          several = unknown.has_value();
          unknown = digit;
          factor = count;
        }
      }
      if (unknown && !several && value > 0 && value % factor == 0) known[*unknown] = value / factor;
    }
  dit::Config config = blocks;
  const auto take = [&](size_t digit, int64_t& to) {
    if (const auto found = known.find(digit); found != known.end()) to = found->second;
  };
  take(0, config.hidden);
  config.mlp = 4 * config.hidden;
  take(1, config.mlp);
  take(2, config.in_channels);
  take(3, config.out_channels);
  take(4, config.prompt_dim);
  take(5, config.pooled_dim);
  take(6, config.sinusoid_dim);
  const int64_t head = replaced.empty() ? 128 : replaced.begin()->second.numel();
  config.num_heads = head > 0 && config.hidden % head == 0 ? config.hidden / head : 1;
  return config;
}

/// lora_alpha and r of PEFT's configuration, for one module.
class PeftConfig {
 public:
  PeftConfig() = default;
  PeftConfig(const Metadata& metadata, std::string prefix) : prefix_(std::move(prefix)) {
    const auto found = metadata.find("lora_adapter_metadata");
    if (found == metadata.end()) return;
    config_ = nlohmann::json::parse(found->second, nullptr, /*allow_exceptions=*/false);
    if (!config_.is_object())
      throw InputError("LoRA metadata lora_adapter_metadata is not a JSON object");
  }

  bool uses_dora() const {
    const auto* value = find("use_dora");
    return value && value->is_boolean() && value->get<bool>();
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
    const auto found = config_.find(prefix_ + key);
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
  std::string prefix_;
  nlohmann::json config_ = nlohmann::json::object();
};

/// `tensor` times `scale`, in its dtype where that holds the products, else in float32; or in `dtype`.
at::Tensor scaled(const at::Tensor& tensor, double scale, std::optional<at::ScalarType> dtype) {
  if (scale == 1) return dtype ? to_dtype(tensor, *dtype) : tensor;
  const at::Tensor product = to_dtype(tensor, at::kFloat).to(at::kDouble) * scale;
  if (dtype) return to_dtype(product.to(at::kFloat), *dtype);
  if (tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf) {
    const at::Tensor narrow = product.to(tensor.scalar_type());
    if (at::equal(narrow.to(at::kDouble), product)) return narrow;
  }
  return product.to(at::kFloat);
}

/// Whether all of the tensor is exactly zero.
bool is_zero(const at::Tensor& tensor) {
  return tensor.numel() == 0 || !to_dtype(tensor, at::kFloat).any().item<bool>();
}

}  // namespace

// --- AdapterFile

const std::vector<std::pair<std::string, Layout>>& layout_words() {
  static const std::vector<std::pair<std::string, Layout>> words{
      {"sd-scripts", Layout::kSdScripts},
      {"diffusers", Layout::kDiffusers},
      {"mixture", Layout::kMixture},
      {"onetrainer", Layout::kOneTrainer},
      {"comfyui", Layout::kComfyUi},
      {"xlabs", Layout::kXlabs},
      {"bfl-control", Layout::kControl},
      {"fal", Layout::kFal},
      {"kohya", Layout::kSdScripts},
      {"peft", Layout::kDiffusers}};
  return words;
}

std::string_view layout_name(Layout layout) {
  for (const auto& [word, known] : layout_words())
    if (known == layout) return word;
  throw std::invalid_argument("a layout without a name");
}

struct AdapterFile::Impl {
  dit::Config config;
  Layout layout = Layout::kSdScripts;
  std::map<std::string, std::vector<Part>> by_path;  // parts in the order of their rows
  std::vector<Target> targets;
  std::vector<TextModule> text;
  TensorMap replaced, embeddings;

  Impl(const TensorMap& tensors, const Metadata& metadata, std::optional<dit::Config> given) {
    dit::Config blocks;
    if (given) {
      blocks = *given;
    } else {
      blocks.num_double_blocks = blocks.num_single_blocks = 0;
      count_blocks(tensors, blocks);
    }
    const bool infers = !given;
    auto parts = collect(tensors, metadata, infers ? symbolic(blocks) : blocks);
    config = infers ? infer_config(blocks, parts, replaced) : blocks;
    for (const auto& [name, tensor] : replaced)
      if (tensor.size(0) != config.head_dim())
        refuse(name, fmt::format("shape {}, expected [{}]", shape_text(tensor), config.head_dim()));
    const Places names = infers ? module_names(config) : Places();
    const PeftConfig peft(metadata, "transformer.");
    bool has_magnitude = false;
    for (auto& [module, part] : parts) {
      if (infers) part.place = names.at(module);
      check(module, part);
      if (part.has_pair()) {
        const int64_t rank = part.down.size(0);
        if (part.alpha) part.scale = *part.alpha / static_cast<double>(rank);
        const bool is_fal = part.place.layout == Layout::kFal;
        if (!part.alpha && (is_fal || !part.place.diffusers.empty()))
          part.scale = peft.scale(is_fal ? part.place.path : part.place.diffusers, rank);
      }
      has_magnitude = has_magnitude || part.magnitude.defined();
      by_path[part.place.path].push_back(std::move(part));
    }
    if (peft.uses_dora() && !has_magnitude)
      throw InputError("LoRA metadata: use_dora is set, but no lora_magnitude_vector is there",
                       "the file is incomplete");
    for (Target target : all_targets(config)) {
      const auto found = by_path.find(target.path);
      if (found == by_path.end()) continue;
      std::ranges::sort(found->second, {}, [](const Part& part) { return part.place.first_row; });
      describe(target, found->second);
      targets.push_back(std::move(target));
    }
    if (targets.empty() && text.empty() && replaced.empty())
      throw InputError("the file holds no LoRA", "give a LoRA of a FLUX transformer");
  }

  std::map<std::string, Part> collect(const TensorMap& tensors,
                                      const Metadata& metadata,
                                      const dit::Config& names_of) {
    const Places names = module_names(names_of);
    const auto norms = replaced_names(names_of);
    const auto texts = text_names();
    std::map<std::string, Part> parts;
    std::map<std::string, std::pair<TextPlace, Part>> text_parts;
    std::map<Layout, int64_t> votes;
    bool onetrainer = false;
    for (const auto& [name, tensor] : tensors) {
      if (name.starts_with(kEmbedding)) {
        embeddings[name] = tensor;
        onetrainer = true;
        continue;
      }
      if (const auto norm = norms.find(name); norm != norms.end()) {
        if (tensor.dim() != 1 || !tensor.is_floating_point())
          refuse(name, "shape " + shape_text(tensor) + " is no norm's");
        if (!replaced.emplace(norm->second, tensor).second) refuse(name, "a second one");
        votes[name.starts_with("double") || name.starts_with("single") ? Layout::kControl
              : name.starts_with("transformer.")                       ? Layout::kDiffusers
                                                                       : Layout::kComfyUi] += 1;
        continue;
      }
      const auto suffix = std::find_if(std::begin(kSuffixes),
                                       std::end(kSuffixes),
                                       [&](const Suffix& s) { return name.ends_with(s.text); });
      if (suffix == std::end(kSuffixes)) refuse(name, reason(name));
      const auto module = name.substr(0, name.size() - suffix->text.size());
      Part* part = nullptr;
      if (const auto place = names.find(module); place != names.end()) {
        part = &parts[module];
        part->place = place->second;
        ++votes[place->second.layout];
      } else if (const auto text_place = texts.find(module); text_place != texts.end()) {
        if (suffix->role > Role::kAlpha) refuse(name, "text encoders have plain LoRA only");
        auto& entry = text_parts[module];
        entry.first = text_place->second;
        part = &entry.second;
        onetrainer = onetrainer || module.starts_with("lora_te2_");
      } else {
        refuse(name, reason(name));
      }
      add(name, suffix->role, tensor, *part);
    }
    for (auto& [module, part] : parts) join_mix(module, part);
    const PeftConfig peft[] = {{metadata, "text_encoder."}, {metadata, "text_encoder_2."}};
    for (auto& [module, entry] : text_parts) {
      add_text(module, entry.first, entry.second, peft[entry.first.encoder == Encoder::kT5]);
      if (votes.empty()) layout = entry.first.layout;
    }
    int64_t most = 0;
    for (const auto& [voted, count] : votes)
      if (count > most) {
        most = count;
        layout = voted;
      }
    if (onetrainer && (layout == Layout::kMixture || votes.empty())) layout = Layout::kOneTrainer;
    return parts;
  }

  static void add(const std::string& name, Role role, const at::Tensor& tensor, Part& part) {
    if (role == Role::kAlpha) {
      if (part.alpha) refuse(name, "a second pair for the same layer");
      part.alpha = read_alpha(name, tensor);
      return;
    }
    auto& slot = slot_of(part, role);
    if (slot.defined()) refuse(name, "a second pair for the same layer");
    if (role == Role::kWhole) part.whole = true;
    // 8 bits are for storage: bfloat16 has the same values
    const bool narrow = tensor.is_floating_point() && tensor.element_size() == 1;
    slot = narrow ? to_dtype(tensor, at::kBFloat16) : tensor;
    if (role == Role::kReshape) return;
    const bool flat = role == Role::kBias || role == Role::kScaledBias;
    if (role == Role::kScaledBias) part.scaled_bias = true;
    if (role == Role::kMagnitude && slot.dim() == 1) slot = slot.view({-1, 1});
    if (slot.dim() != (flat ? 1 : 2) || !tensor.is_floating_point())
      refuse(
          name,
          fmt::format("shape {} is no {} of floats", shape_text(tensor), flat ? "row" : "matrix"));
  }

  void add_text(const std::string& module,
                const TextPlace& place,
                const Part& part,
                const PeftConfig& peft) {
    if (!part.down.defined() || !part.up.defined())
      refuse(module, "half of the pair down, up is missing");
    if (part.down.size(0) != part.up.size(1) || part.down.size(0) == 0)
      refuse(
          module,
          fmt::format(
              "down {} and up {} do not fit together", shape_text(part.down), shape_text(part.up)));
    const auto rank = static_cast<double>(part.down.size(0));
    const bool is_peft = place.layout == Layout::kDiffusers;
    const double alpha = part.alpha ? *part.alpha
                         : is_peft  ? rank * peft.scale(place.path, part.down.size(0))
                                    : rank;
    for (const TextModule& other : text)
      if (other.encoder == place.encoder && other.path == place.path)
        refuse(module, "a second pair for the same layer");
    text.push_back({place.encoder, place.path, part.down, part.up, alpha});
  }

  static void check(const std::string& module, const Part& part) {
    const Place& place = part.place;
    const bool lokr = part.mix.defined();
    const auto shape = std::vector<int64_t>{place.rows, place.in};
    if (part.diff.defined() && !part.diff.sizes().equals(shape))
      refuse(module + ".diff",
             fmt::format("shape {}, expected {}", shape_text(part.diff), shape_text(shape)));
    if (part.bias.defined() && part.bias.size(0) != place.rows)
      refuse(
          module,
          fmt::format("the bias has shape {}, expected [{}]", shape_text(part.bias), place.rows));
    if (part.magnitude.defined() &&
        (part.magnitude.size(0) != place.rows || part.magnitude.size(1) != 1))
      refuse(
          module + ".dora_scale",
          fmt::format("shape {}, expected {} (norms of rows; those of columns are not supported)",
                      shape_text(part.magnitude),
                      shape_text(std::vector<int64_t>{place.rows, 1})));
    const bool lone = !part.down.defined() && !part.up.defined() && !lokr;
    if (lone && (part.diff.defined() || part.bias.defined()) && !part.magnitude.defined()) return;
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
                         shape_text(shape)));
  }

  /// Rank and alpha as fuse() makes them.
  static void describe(Target& target, const std::vector<Part>& parts) {
    int64_t covered = 0;
    double scale = 0;
    bool one_scale = true, first = true;
    for (const Part& part : parts) {
      if (part.place.first_row < covered) refuse(target.path, "two pairs for the same rows");
      covered = part.place.first_row + part.place.rows;
      if (!part.has_pair()) continue;
      target.rank += part.down.size(0);
      one_scale = one_scale && (first || part.scale == scale);
      if (first) scale = part.scale;
      first = false;
    }
    target.alpha = (one_scale ? scale : 1) * static_cast<double>(target.rank);
    if (parts.size() == 1 && parts[0].alpha && target.rank > 0) target.alpha = *parts[0].alpha;
  }

  /// One module from the parts of one Linear, exactly: downs stacked, ups on the diagonal.
  Entry fuse(const Target& target, const std::vector<Part>& parts) const {
    Entry entry;
    Module& module = entry.module;
    module.path = target.path;
    module.alpha = target.alpha;
    const bool whole = parts.size() == 1 && parts[0].place.rows == target.out;
    std::optional<double> common;  // scale of all parts
    bool one_scale = true;
    for (const Part& part : parts) {
      if (!part.has_pair()) continue;
      one_scale = one_scale && part.scale == common.value_or(part.scale);
      common = part.scale;
    }
    std::vector<at::Tensor> downs, ups;
    const auto rows_of = [&](at::Tensor& to, const Part& part, at::Tensor from) {
      if (part.place.swap_halves) from = swap_halves(from);
      if (whole) {
        to = from;
        return;
      }
      if (!to.defined()) {
        auto shape = from.sizes().vec();
        shape[0] = target.out;
        to = at::zeros(shape, from.options());
      }
      if (c10::promoteTypes(to.scalar_type(), from.scalar_type()) != to.scalar_type())
        to = to.to(from.scalar_type());
      to.narrow(0, part.place.first_row, part.place.rows).copy_(from);
    };
    size_t magnitudes = 0, pairs = 0;
    int64_t covered = 0;
    for (const Part& part : parts) {
      const bool lokr = part.mix.defined();
      if (part.place.swap_halves && lokr)
        refuse(target.path, "LoKr in diffusers' order of rows is not supported");
      if (lokr && !whole) refuse(target.path, "LoKr of a part of the layer is not supported");
      if (part.diff.defined()) rows_of(entry.diff, part, part.diff);
      if (part.bias.defined())
        rows_of(entry.bias, part, part.scaled_bias ? scaled(part.bias, part.scale, {}) : part.bias);
      if (part.magnitude.defined()) {
        rows_of(module.magnitude, part, part.magnitude);
        ++magnitudes;
      }
      if (!part.has_pair()) continue;
      ++pairs;
      covered += part.place.rows;
      at::Tensor up = part.up;
      if (up.defined()) {
        if (part.place.swap_halves) up = swap_halves(up);
        if (!one_scale) up = scaled(up, part.scale, {});
      }
      downs.push_back(part.down);
      ups.push_back(up);
      if (lokr) module.mix = part.mix;
    }
    if (magnitudes > 0 && (magnitudes != parts.size() || covered != target.out))
      refuse(target.path, "DoRA of a part of the layer cannot be one of all of it");
    if (pairs == 0) return entry;
    if (whole) {
      module.down = downs[0];
      module.up = ups[0];
      return entry;
    }
    module.down = at::cat(downs, 0);
    auto type = ups[0].scalar_type();
    for (const at::Tensor& up : ups) type = c10::promoteTypes(type, up.scalar_type());
    module.up = at::zeros({target.out, target.rank}, ups[0].options().dtype(type));
    int64_t column = 0;
    size_t next = 0;
    for (const Part& part : parts) {
      if (!part.has_pair()) continue;
      module.up.narrow(0, part.place.first_row, part.place.rows)
          .narrow(1, column, part.down.size(0))
          .copy_(ups[next++]);
      column += part.down.size(0);
    }
    return entry;
  }

  const std::vector<Part>& parts(const std::string& path) const {
    const auto found = by_path.find(path);
    if (found == by_path.end()) throw std::invalid_argument("no adapter of " + path);
    return found->second;
  }
};

AdapterFile::AdapterFile(const TensorMap& tensors,
                         const Metadata& metadata,
                         std::optional<dit::Config> config)
    : impl_(std::make_shared<const Impl>(tensors, metadata, std::move(config))) {}

Layout AdapterFile::layout() const { return impl_->layout; }
const dit::Config& AdapterFile::config() const { return impl_->config; }
const std::vector<Target>& AdapterFile::targets() const { return impl_->targets; }
const std::vector<TextModule>& AdapterFile::text_modules() const { return impl_->text; }
const TensorMap& AdapterFile::replaced() const { return impl_->replaced; }
const TensorMap& AdapterFile::embeddings() const { return impl_->embeddings; }

Entry AdapterFile::entry(const std::string& path) const {
  const auto& parts = impl_->parts(path);
  const auto target = std::ranges::find(impl_->targets, path, &Target::path);
  return impl_->fuse(*target, parts);
}

std::vector<at::Tensor> AdapterFile::sources(const std::string& path) const {
  std::vector<at::Tensor> out;
  for (const Part& part : impl_->parts(path))
    for (const at::Tensor* tensor : {&part.down,
                                     &part.up,
                                     &part.mix,
                                     &part.mix_a,
                                     &part.mix_b,
                                     &part.magnitude,
                                     &part.diff,
                                     &part.bias})
      if (tensor->defined()) out.push_back(*tensor);
  return out;
}

void add_peft_config(const std::filesystem::path& file, Metadata& metadata) {
  namespace fs = std::filesystem;
  std::error_code error;
  const bool is_folder = fs::is_directory(file, error);
  if (metadata.contains("lora_adapter_metadata") ||
      (!is_folder && file.filename() != "adapter_model.safetensors"))
    return;
  const fs::path beside = (is_folder ? file : file.parent_path()) / "adapter_config.json";
  if (!fs::is_regular_file(beside, error)) return;
  const auto config = nlohmann::json::parse(read_file(beside, 1 << 20), nullptr, false);
  if (!config.is_object()) throw InputError(show(beside) + ": is no JSON object");
  nlohmann::json out = nlohmann::json::object();
  for (const auto& [key, value] : config.items()) out["transformer." + key] = value;
  metadata["lora_adapter_metadata"] = out.dump();
}

// --- LayoutWriter

Module without_lokr(const Module& module) {
  if (!module.mix.defined()) return module;
  Module out{module.path, {}, {}, module.alpha};
  out.magnitude = module.magnitude;
  const at::Tensor mix = module.mix.to(at::kFloat), down = module.down.to(at::kFloat);
  // kron(mix, up down) = kron(mix, up) kron(1, down) = kron(1, up) kron(mix, down)
  const bool by_columns = mix.size(1) <= mix.size(0);
  const at::Tensor one = at::eye(by_columns ? mix.size(1) : mix.size(0));
  at::Tensor up, rest = down;
  if (module.up.defined()) {
    up = module.up.to(at::kFloat);
  } else if (down.size(0) <= down.size(1)) {
    up = at::eye(down.size(0));
  } else {
    up = down;
    rest = at::eye(down.size(1));
  }
  out.up = by_columns ? at::kron(mix, up) : at::kron(one, up);
  out.down = by_columns ? at::kron(one, rest) : at::kron(mix, rest);
  out.alpha = module.scale() * static_cast<double>(out.down.size(0));
  return out;
}

namespace {

/// The rows of a module and the columns of its up that belong to them.
struct Split {
  std::string name;  // of diffusers
  int64_t first_row = 0, rows = 0;
  bool swap_halves = false;
  int64_t first = 0, rank = 0;  // columns; none: the part does nothing
};

/// Finds the diagonal blocks. Otherwise every part has all columns.
void find_columns(const at::Tensor& up, std::vector<Split>& parts) {
  const int64_t rank = up.size(1), n = std::ssize(parts);
  for (Split& part : parts) {
    part.first = 0;
    part.rank = rank;
  }
  if (n == 1) return;
  std::vector<std::vector<bool>> used;  // by part: columns that are not all zero
  for (const Split& part : parts) {
    const at::Tensor any =
        (to_dtype(up.narrow(0, part.first_row, part.rows), at::kFloat) != 0).any(0).contiguous();
    const bool* data = any.const_data_ptr<bool>();
    used.emplace_back(data, data + rank);
  }
  const auto set = [&](size_t j, int64_t first, int64_t count) {
    parts[j].first = first;
    parts[j].rank = count;
  };
  if (rank % n == 0) {
    const int64_t each = rank / n;
    bool diagonal = true;
    for (int64_t j = 0; j < n; ++j)
      for (int64_t c = 0; c < rank; ++c)
        if (c / each != j && used[static_cast<size_t>(j)][static_cast<size_t>(c)]) diagonal = false;
    if (diagonal) {
      for (int64_t j = 0; j < n; ++j) set(static_cast<size_t>(j), j * each, each);
      return;
    }
  }
  // blocks of several ranks, or of some parts only
  std::vector<std::pair<int64_t, int64_t>> ranges;
  int64_t last = 0;
  for (const auto& columns : used) {
    const auto first = std::ranges::find(columns, true);
    if (first == columns.end()) {
      ranges.emplace_back(0, 0);
      continue;
    }
    int64_t begin = first - columns.begin(), end = rank;
    while (!columns[static_cast<size_t>(end - 1)]) --end;
    if (begin < last) return;
    last = end;
    ranges.emplace_back(begin, end - begin);
  }
  if (last == 0) return;
  for (size_t j = 0; j < parts.size(); ++j) set(j, ranges[j].first, ranges[j].second);
}

/// How a layout spells.
struct Spelling {
  bool diffusers = false, underscores = false, has_alpha = false, ab = false, lycoris = false;
  const char* prefix = "";
};
Spelling spelling_of(Layout layout) {
  switch (layout) {
    case Layout::kSdScripts:
      return {.underscores = true, .has_alpha = true, .lycoris = true, .prefix = "lora_unet_"};
    case Layout::kDiffusers:
      return {.diffusers = true, .ab = true, .prefix = "transformer."};
    case Layout::kMixture:
    case Layout::kOneTrainer:
      return {
          .diffusers = true, .underscores = true, .has_alpha = true, .prefix = "lora_transformer_"};
    case Layout::kComfyUi:
      return {.has_alpha = true, .lycoris = true, .prefix = "diffusion_model."};
    case Layout::kXlabs:
      return {};
    case Layout::kControl:
      return {.ab = true};
    case Layout::kFal:
      return {.ab = true, .prefix = "base_model.model."};
  }
  throw std::invalid_argument("no such layout");
}

}  // namespace

struct LayoutWriter::Impl {
  Layout layout;
  dit::Config config;
  std::optional<at::ScalarType> dtype;
  Spelling spelling;
  std::map<std::string, std::vector<Split>> splits;  // by BFL path
  std::map<std::string, Target> targets;
  std::map<std::string, std::string> norms;  // diffusers' name by BFL's

  Impl(Layout to, const dit::Config& of, std::optional<at::ScalarType> type)
      : layout(to), config(of), dtype(type), spelling(spelling_of(to)) {
    for (const Target& target : all_targets(config)) targets[target.path] = target;
    for (const auto& tensor : dit::diffusers_layout(config)) {
      if (tensor.bfl.ends_with(".scale")) norms[tensor.bfl] = tensor.name;
      if (tensor.shape.size() == 2)
        splits[module_of(tensor.bfl)].push_back(
            {module_of(tensor.name), tensor.first_row, tensor.num_rows(), tensor.swap_halves});
    }
  }

  std::string name_of(const std::string& path) const {
    return spelling.prefix + (spelling.underscores ? underscored(path) : path);
  }
  [[noreturn]] void cannot(const std::string& path, const char* what) const {
    throw InputError(
        fmt::format("LoRA module {}: the layout {} has no {}", path, layout_name(layout), what),
        "convert to another layout: sd-scripts and comfyui have all of them");
  }
  at::Tensor typed(const at::Tensor& tensor) const { return scaled(tensor, 1, dtype); }

  void emit_alpha(const std::string& name,
                  double value,
                  at::ScalarType type,
                  const Emit& emit) const {
    // alpha has the dtype of the rest, as sd-scripts saves it, unless that would change it
    const auto alpha = at::full({}, value, at::kFloat);
    const bool exact = alpha.to(type).item<float>() == alpha.item<float>();
    emit(name + ".alpha", exact ? alpha.to(type) : alpha);
  }

  /// A pair under the layout's suffixes.
  void emit_pair(const std::string& name,
                 const at::Tensor& down,
                 const at::Tensor& up,
                 double alpha,
                 const Emit& emit) const {
    const double scale = spelling.has_alpha ? 1 : alpha / static_cast<double>(down.size(0));
    const bool xlabs = layout == Layout::kXlabs;
    const std::string suffix_down = xlabs         ? ".down"
                                    : spelling.ab ? ".lora_A"
                                                  : ".lora_down",
                      suffix_up = xlabs         ? ".up"
                                  : spelling.ab ? ".lora_B"
                                                : ".lora_up";
    const at::Tensor a = typed(down);
    emit(name + suffix_down + ".weight", a);
    emit(name + suffix_up + ".weight", scaled(up, scale, dtype));
    if (spelling.has_alpha) emit_alpha(name, alpha, a.scalar_type(), emit);
  }

  void emit_lokr(const std::string& name, const Module& module, const Emit& emit) const {
    emit(name + ".lokr_w1", typed(module.mix));
    const at::Tensor down = typed(module.down);
    if (module.up.defined()) {
      emit(name + ".lokr_w2_b", down);
      emit(name + ".lokr_w2_a", typed(module.up));
    } else {
      emit(name + ".lokr_w2", down);
    }
    emit_alpha(name, module.alpha, down.scalar_type(), emit);
  }

  at::Tensor magnitude(const Module& module) const {
    return dtype ? module.magnitude.to(at::kFloat) : module.magnitude;
  }

  void write_bfl(const Entry& entry, const Emit& emit) const {
    const Module& given = entry.module;
    const std::string& path = given.path;
    const std::string name = name_of(path);
    if (entry.diff.defined()) {
      if (!spelling.lycoris) cannot(path, "full differences of weights");
      emit(name + ".diff", typed(entry.diff));
    }
    if (entry.bias.defined()) {
      if (!spelling.lycoris && !given.down.defined()) cannot(path, "differences of biases alone");
      emit(name + (spelling.lycoris ? ".diff_b" : ".lora_B.bias"), typed(entry.bias));
    }
    if (!given.down.defined()) return;
    if (given.magnitude.defined()) {
      if (layout == Layout::kControl) cannot(path, "magnitudes (DoRA)");
      if (spelling.lycoris)
        emit(name + ".dora_scale", magnitude(given));
      else
        emit(name + ".lora_magnitude_vector", magnitude(given).flatten());
    }
    if (given.mix.defined() && spelling.lycoris) return emit_lokr(name, given, emit);
    const Module module = without_lokr(given);
    emit_pair(name, module.down, module.up, module.alpha, emit);
    // a layer with more inputs than the base has: its weight is widened
    if (layout == Layout::kComfyUi && path == "img_in" && config.in_channels != 64)
      emit(name + ".reshape_weight", at::tensor({config.hidden, config.in_channels}, at::kLong));
  }

  void write_xlabs(const Entry& entry, const Emit& emit) const {
    const std::string& path = entry.module.path;
    const auto name = xlabs_name(path);
    if (!name) cannot(path, "such module");
    if (entry.diff.defined() || entry.bias.defined()) cannot(path, "full differences");
    if (entry.module.magnitude.defined()) cannot(path, "magnitudes (DoRA)");
    const Module module = without_lokr(entry.module);
    const Target& target = targets.at(path);
    const int64_t rows = xlabs_rows(target, config);
    if (!is_zero(module.up.narrow(0, rows, target.out - rows))) cannot(path, "rows of the MLP");
    emit_pair(*name, module.down, module.up.narrow(0, 0, rows), module.alpha, emit);
  }

  void write_diffusers(const Entry& entry, const Emit& emit) const {
    const std::string& path = entry.module.path;
    if (entry.diff.defined()) cannot(path, "full differences of weights");
    const bool has_magnitude = entry.module.magnitude.defined();
    if (entry.bias.defined() && (!entry.module.down.defined() || layout != Layout::kDiffusers))
      cannot(path, "differences of biases");
    const Module module = without_lokr(entry.module);
    std::vector<Split> parts = splits.at(path);
    find_columns(module.up, parts);
    for (Split& part : parts) {
      const auto rows = [&](const at::Tensor& of) {
        const at::Tensor slice = of.narrow(0, part.first_row, part.rows);
        return part.swap_halves ? swap_halves(slice) : slice;
      };
      const bool has_bias = entry.bias.defined() && !is_zero(rows(entry.bias));
      if (part.rank == 0) {
        if (!has_bias && !has_magnitude) continue;
        part.rank = 1;  // what follows needs a pair; its up is zero
      }
      const std::string name = name_of(part.name);
      emit_pair(name,
                module.down.narrow(0, part.first, part.rank),
                rows(module.up).narrow(1, part.first, part.rank),
                part.rank == module.rank() ? module.alpha
                                           : module.scale() * static_cast<double>(part.rank),
                emit);
      if (has_bias) emit(name + ".lora_B.bias", typed(rows(entry.bias)));
      if (!has_magnitude) continue;
      if (spelling.ab)
        emit(name + ".lora_magnitude_vector", rows(magnitude(module)).flatten());
      else
        emit(name + ".dora_scale", rows(magnitude(module)));
    }
  }
};

LayoutWriter::LayoutWriter(Layout layout,
                           const dit::Config& config,
                           std::optional<at::ScalarType> dtype)
    : impl_(std::make_shared<const Impl>(layout, config, dtype)) {}

void LayoutWriter::write(const Entry& entry, const Emit& emit) const {
  if (impl_->layout == Layout::kXlabs) return impl_->write_xlabs(entry, emit);
  if (impl_->spelling.diffusers) return impl_->write_diffusers(entry, emit);
  impl_->write_bfl(entry, emit);
}

void LayoutWriter::write(const TextModule& module, const Emit& emit) const {
  const auto prefix = text_prefix(impl_->layout, module.encoder);
  if (!prefix) impl_->cannot(module.path, "text encoders");
  const std::string path = prefix->ends_with('_') ? underscored(module.path) : module.path;
  impl_->emit_pair(std::string(*prefix) + path, module.down, module.up, module.alpha, emit);
}

void LayoutWriter::write_replaced(const std::string& name,
                                  const at::Tensor& tensor,
                                  const Emit& emit) const {
  const at::Tensor typed = impl_->typed(tensor);
  if (impl_->layout == Layout::kControl)
    emit(name, typed);
  else if (impl_->layout == Layout::kComfyUi)
    emit("diffusion_model." + name + ".set_weight", typed);
  else if (impl_->layout == Layout::kDiffusers)
    emit("transformer." + impl_->norms.at(name), typed);
  else
    throw InputError(
        fmt::format(
            "LoRA tensor {}: the layout {} has no whole norms", name, layout_name(impl_->layout)),
        "convert to bfl-control, comfyui or diffusers");
}

void LayoutWriter::write_embedding(const std::string& name,
                                   const at::Tensor& tensor,
                                   const Emit& emit) const {
  if (impl_->layout != Layout::kOneTrainer)
    throw InputError(fmt::format("LoRA tensor {}: the layout {} has no embeddings",
                                 printable(name),
                                 layout_name(impl_->layout)));
  emit(name, tensor);
}

// --- all at once

TensorMap to_layout(const Adapters& adapters,
                    Layout layout,
                    const dit::Config& config,
                    std::optional<at::ScalarType> dtype) {
  const LayoutWriter writer(layout, config, dtype);
  TensorMap out;
  for (const Module& module : adapters.modules) {
    Entry entry{module, {}, {}};
    for (at::Tensor* part : entry.module.parts())
      if (part->defined()) *part = part->detach();
    writer.write(entry, [&](const std::string& name, const at::Tensor& tensor) {
      out[name] = tensor.contiguous();
    });
  }
  return out;
}

TensorMap to_kohya(const Adapters& adapters, at::ScalarType dtype) {
  return to_layout(adapters, Layout::kSdScripts, {}, dtype);
}

Adapters from_tensors(const TensorMap& tensors,
                      const Metadata& metadata,
                      const dit::Config& config) {
  const AdapterFile file(tensors, metadata, config);
  if (!file.text_modules().empty())
    refuse_module(file.text_modules().front().path,
                  "adapters of text encoders are not supported here");
  if (!file.replaced().empty())
    refuse(file.replaced().begin()->first, "replaced norms (control LoRA) are not supported here");
  if (!file.embeddings().empty())
    refuse(file.embeddings().begin()->first, "embeddings are not supported here");
  Adapters adapters;
  for (const Target& target : file.targets()) {
    Entry entry = file.entry(target.path);
    if (entry.diff.defined())
      refuse_module(target.path, "full differences of weights are not supported here");
    if (entry.bias.defined())
      refuse_module(target.path, "adapters with a bias (control LoRA) are not supported here");
    adapters.modules.push_back(std::move(entry.module));
  }
  return adapters;
}

}  // namespace flux::lora
