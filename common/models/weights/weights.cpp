#include "common/models/weights/weights.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>
#include <set>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/quant/quant.h"
#include "common/tensor/tensor.h"

namespace flux {
namespace {

/// How a net is known in a file. Source: the published files of the nets.
struct NetTraits {
  NetKind kind;
  std::string_view title;
  std::vector<std::string_view> prefixes;  // the one without any is always tried first
  std::vector<std::string_view> anchors;   // a name of each layout that only this net has
};

const std::vector<NetTraits>& all_traits() {
  static const std::vector<NetTraits> traits = {
      {NetKind::kFlux,
       "FLUX transformer",
       {"model.diffusion_model.", "diffusion_model.", "transformer."},
       {"double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "single_blocks.0.linear1.weight",
        "transformer_blocks.0.attn.add_k_proj.weight",
        "transformer_blocks.0.attn.norm_added_k.weight",
        "single_transformer_blocks.0.proj_mlp.weight"}},
      {NetKind::kAutoEncoder,
       "autoencoder",
       {"vae.", "first_stage_model."},
       {"encoder.down.0.block.0.norm1.weight",
        "encoder.down_blocks.0.resnets.0.norm1.weight",
        "decoder.up.0.block.0.norm1.weight",
        "decoder.up_blocks.0.resnets.0.norm1.weight"}},
      {NetKind::kT5,
       "T5 encoder",
       {"text_encoders.t5xxl.transformer.", "transformer."},
       {"encoder.block.0.layer.0.SelfAttention.q.weight"}},
      {NetKind::kClip,
       "CLIP text encoder",
       {"text_encoders.clip_l.transformer.",
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        "transformer."},
       {"text_model.embeddings.token_embedding.weight",
        "embeddings.token_embedding.weight",
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
        "encoder.layers.0.self_attn.q_proj.weight"}},
  };
  return traits;
}

const NetTraits& traits_of(NetKind kind) { return all_traits()[static_cast<size_t>(kind)]; }

/// Beginnings of names that some all-in-one file uses, and that no net uses inside itself.
constexpr std::string_view kSharedPrefixes[] = {"model.diffusion_model.",
                                                "diffusion_model.",
                                                "vae.",
                                                "first_stage_model.",
                                                "text_encoders.",
                                                "cond_stage_model.",
                                                "conditioner."};

/// The prefix under which the file holds the net.
std::optional<std::string> find_prefix(const TensorMap& tensors, const NetTraits& net) {
  const auto holds = [&](std::string_view prefix) {
    return std::any_of(net.anchors.begin(), net.anchors.end(), [&](std::string_view anchor) {
      return tensors.contains(std::string(prefix).append(anchor));
    });
  };
  if (holds("")) return "";
  for (const std::string_view prefix : net.prefixes) {
    if (holds(prefix)) return std::string(prefix);
  }
  return std::nullopt;
}

bool any_name(const TensorMap& tensors, auto&& matches) {
  return std::any_of(tensors.begin(), tensors.end(), [&](const auto& entry) {
    return matches(std::string_view(entry.first));
  });
}
bool any_contains(const TensorMap& tensors, std::string_view part) {
  return any_name(tensors,
                  [&](std::string_view name) { return name.find(part) != std::string_view::npos; });
}
bool any_ends(const TensorMap& tensors, std::string_view end) {
  return any_name(tensors, [&](std::string_view name) { return name.ends_with(end); });
}
bool any_starts(const TensorMap& tensors, std::string_view start) {
  return any_name(tensors, [&](std::string_view name) { return name.starts_with(start); });
}
/// Length of a dimension of a tensor, 0 if there is no such tensor or dimension.
int64_t length_of(const TensorMap& tensors, const std::string& name, int64_t dimension) {
  const auto it = tensors.find(name);
  return it == tensors.end() || it->second.dim() <= dimension ? 0 : it->second.size(dimension);
}

/// Kinds of files that look like ours and are not; the reason, or "". Tensors have the prefix off
/// if it is known.
std::string packed_kind(const TensorMap& tensors) {
  if (any_ends(tensors, ".scale_weight") || any_ends(tensors, ".weight_scale") ||
      any_ends(tensors, ".input_scale") || any_ends(tensors, ".scale_input") ||
      any_ends(tensors, "scaled_fp8") || any_ends(tensors, ".comfy_quant")) {
    return "scaled fp8 weights";
  }
  if (any_ends(tensors, ".absmax") || any_contains(tensors, ".quant_map") ||
      any_contains(tensors, "bitsandbytes")) {
    return "weights quantised by bitsandbytes";
  }
  if (any_ends(tensors, ".qweight") || any_ends(tensors, ".qzeros"))
    return "weights in a packed 4-bit format";
  return "";
}

std::string unsupported_flux(const TensorMap& tensors) {
  if (any_contains(tensors, "distilled_guidance_layer.")) return "a Chroma transformer";
  if (any_contains(tensors, "double_stream_modulation_img") ||
      any_contains(tensors, "single_stream_modulation")) {
    return "a FLUX.2 transformer";
  }
  if (any_contains(tensors, ".lora_") || any_contains(tensors, "lora_unet_") ||
      any_contains(tensors, "_lora1.") || any_contains(tensors, "_lora.") ||
      any_contains(tensors, ".lokr_") || any_contains(tensors, ".hada_")) {
    return "a LoRA, not a whole transformer";
  }
  const int64_t channels =
      std::max(length_of(tensors, "img_in.weight", 1), length_of(tensors, "x_embedder.weight", 1));
  if (channels == 128) return "a FLUX.1 Control transformer (Canny or Depth)";
  if (channels == 384) return "a FLUX.1 Fill transformer";
  return "";
}

/// Kontext has the very tensors of FLUX.1-dev; only names and metadata tell.
bool says_kontext(const WeightFile& file) {
  const auto says = [](std::string_view text) {
    return lower_ascii(text).find("kontext") != std::string::npos;
  };
  if (says(file.path.filename().native())) return true;
  for (auto folder = file.path.parent_path(); folder.has_relative_path();
       folder = folder.parent_path()) {
    if (lower_ascii(folder.filename().native()).find("flux.1-kontext") != std::string::npos)
      return true;
  }
  return std::any_of(file.metadata.begin(), file.metadata.end(), [&](const auto& entry) {
    return (entry.first == "modelspec.architecture" || entry.first == "modelspec.title") &&
           says(entry.second);
  });
}

std::string unsupported(const WeightFile& file, const TensorMap& tensors, NetKind kind) {
  if (file.metadata.contains(std::string(kQuantMetadataKey)) && any_ends(tensors, scale_name("")))
    return "weights quantised by flux-model convert";
  if (const std::string packed = packed_kind(tensors); !packed.empty()) return packed;
  switch (kind) {
    case NetKind::kFlux:
      if (const std::string other = unsupported_flux(tensors); !other.empty()) return other;
      return says_kontext(file) ? "a FLUX.1 Kontext transformer" : "";
    case NetKind::kAutoEncoder:
      if (any_starts(tensors, "quant_conv.") || any_starts(tensors, "post_quant_conv.") ||
          length_of(tensors, "encoder.conv_out.weight", 0) == 8 ||
          length_of(tensors, "decoder.conv_in.weight", 1) == 4) {
        return "a Stable Diffusion autoencoder";
      }
      return "";
    case NetKind::kT5:
      if (tensors.contains("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"))
        return "a umT5 encoder";
      if (any_ends(tensors, ".DenseReluDense.wi.weight")) return "a T5 v1.0 encoder";
      return "";
    case NetKind::kClip:
      for (const char* name :
           {"text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"}) {
        if (length_of(tensors, name, 1) == 1280) return "a CLIP-G text encoder";
      }
      return "";
  }
  return "";
}

[[noreturn]] void refuse(const std::filesystem::path& path, std::string_view what, NetKind wanted) {
  throw InputError(fmt::format("{}: {}; this is not supported", show(path), what),
                   fmt::format("give a {} in BF16, F16, F32 or plain F8_E4M3", net_title(wanted)));
}

bool ignored(std::string_view name, std::span<const std::string_view> ignorable) {
  return std::any_of(ignorable.begin(), ignorable.end(), [&](std::string_view pattern) {
    return pattern.ends_with('*') ? name.starts_with(pattern.substr(0, pattern.size() - 1))
                                  : name == pattern;
  });
}

// Weights that people have; whole numbers or doubles under a net's names are something else.
bool is_weight_dtype(at::ScalarType type) {
  return type == at::kBFloat16 || type == at::kHalf || type == at::kFloat ||
         type == at::kFloat8_e4m3fn;
}

}  // namespace

std::string_view net_title(NetKind kind) { return traits_of(kind).title; }

std::vector<NetKind> nets_in(const WeightFile& file) {
  std::vector<NetKind> kinds;
  for (const NetTraits& net : all_traits()) {
    if (find_prefix(file.tensors, net)) kinds.push_back(net.kind);
  }
  return kinds;
}

NetTensors take_net(const WeightFile& file, NetKind kind) {
  const NetTraits& net = traits_of(kind);
  const auto prefix = find_prefix(file.tensors, net);
  if (!prefix) {
    // a refusal by name helps more than "not found"
    if (const std::string what = unsupported(file, file.tensors, kind); !what.empty())
      refuse(file.path, what, kind);
    std::string found;
    for (const NetKind other : nets_in(file))
      found += fmt::format("{}{}", found.empty() ? "" : " and ", net_title(other));
    std::vector<std::string> names;
    for (const auto& [name, tensor] : file.tensors) {
      if (names.size() < 3) names.push_back(printable(name));
    }
    throw InputError(
        fmt::format("{}: no {} in this file\n  it holds {}",
                    show(file.path),
                    net.title,
                    !found.empty() ? fmt::format("the weights of: {}", found)
                                   : fmt::format("{} tensors: {}{}",
                                                 file.tensors.size(),
                                                 join_some(names),
                                                 file.tensors.size() > names.size() ? " ..." : "")),
        fmt::format("give the {} weights", net.title));
  }
  NetTensors out{file.path, file.stamps, *prefix, {}, file.metadata};
  for (const auto& [name, tensor] : file.tensors) {
    if (name.starts_with(*prefix) && !prefix->empty()) {
      out.tensors.emplace(name.substr(prefix->size()), tensor);
      continue;
    }
    const bool other_net = std::any_of(
        std::begin(kSharedPrefixes), std::end(kSharedPrefixes), [&](std::string_view other) {
          return name.starts_with(other);
        });
    if (!other_net) out.tensors.emplace(name, tensor);
  }
  if (const std::string what = unsupported(file, out.tensors, kind); !what.empty())
    refuse(file.path, what, kind);
  return out;
}

int64_t size_for_config(const std::filesystem::path& path,
                        std::string_view title,
                        const TensorMap& tensors,
                        const std::string& name,
                        int64_t dim,
                        const std::string& hint) {
  const auto found = tensors.find(name);
  if (found == tensors.end())
    throw InputError(fmt::format("{}: not {}: no tensor {}", show(path), title, name), hint);
  const at::Tensor& tensor = found->second;
  if (tensor.dim() != 2 && tensor.dim() != 4 && !(tensor.dim() == 1 && dim == 0))
    throw InputError(
        fmt::format("{}: not {}: {} has shape {}", show(path), title, name, shape_text(tensor)),
        hint);
  return tensor.size(dim);
}

TensorMap expect_tensors(const std::filesystem::path& path,
                         std::string_view title,
                         const TensorMap& tensors,
                         const ShapeMap& expected,
                         std::span<const std::string_view> ignorable) {
  TensorMap kept;
  std::vector<std::string> missing, surplus, misshapen, mistyped;
  for (const auto& [name, tensor] : tensors) {
    const auto want = expected.find(name);
    if (want == expected.end()) {
      if (!ignored(name, ignorable)) surplus.push_back(printable(name));
    } else if (!tensor.sizes().equals(want->second)) {
      misshapen.push_back(fmt::format(
          "{} is {}, expected {}", printable(name), shape_text(tensor), shape_text(want->second)));
    } else if (!is_weight_dtype(tensor.scalar_type())) {
      mistyped.push_back(
          fmt::format("{} is {}", printable(name), dtype_name(dtype_of(tensor.scalar_type()))));
    } else {
      kept.emplace(name, tensor);
    }
  }
  for (const auto& [name, shape] : expected) {
    if (!tensors.contains(name)) missing.push_back(printable(name));
  }
  if (missing.empty() && surplus.empty() && misshapen.empty() && mistyped.empty()) return kept;
  std::string message = fmt::format("{}: not the weights of this {}", show(path), title);
  for (const auto& [what, names] : {std::pair("missing", &missing),
                                    {"surplus", &surplus},
                                    {"of another shape", &misshapen},
                                    {"not of BF16, F16, F32 or F8_E4M3", &mistyped}}) {
    if (!names->empty()) {
      message += fmt::format("\n  {} tensor{} {}: {}",
                             names->size(),
                             names->size() == 1 ? "" : "s",
                             what,
                             join_some(*names));
    }
  }
  throw InputError(message, "the file is incomplete, or of another model");
}

TensorMap expect_tensors(const std::filesystem::path& path,
                         std::string_view title,
                         const TensorMap& tensors,
                         const ShapeMap& expected,
                         std::initializer_list<std::string_view> ignorable) {
  return expect_tensors(
      path, title, tensors, expected, std::span(ignorable.begin(), ignorable.size()));
}

}  // namespace flux
