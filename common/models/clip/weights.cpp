#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/models/clip/clip.h"
#include "common/tensor/tensor.h"

namespace flux::clip {
namespace {

constexpr const char* kHint =
    "FLUX.1 takes CLIP-L's text encoder: clip_l.safetensors, or the text_encoder folder";
constexpr const char* kTokens = "text_model.embeddings.token_embedding.weight";
constexpr const char* kPositions = "text_model.embeddings.position_embedding.weight";
constexpr int64_t kHeadSize = 64;         // of every published CLIP text encoder
constexpr int64_t kClipGHidden = 1280;    // SDXL's second text encoder
constexpr double kNormEpsilon = 1e-5;     // what clip.cpp computes with
constexpr int64_t kLegacyEosTokenId = 2;  // a mistake in the config.json of published CLIPs

std::string layer(int64_t i) { return "text_model.encoder.layers." + std::to_string(i) + "."; }

/// Takes from config.json what the weights cannot tell, and compares the rest.
void apply(const nlohmann::json& json, Config& config, const std::filesystem::path& path) {
  const auto refuse = [&](const std::string& what) {
    throw InputError(fmt::format("{}: the config.json beside these weights {}", show(path), what),
                     "use the config.json that belongs to them, or take it away");
  };
  if (!json.is_object()) refuse("is not a JSON object");
  const nlohmann::json& text =
      json.contains("text_config") && json["text_config"].is_object() ? json["text_config"] : json;
  const auto integer = [&](const char* key, int64_t fallback) {
    if (!text.contains(key)) return fallback;
    if (!text[key].is_number_integer()) refuse(fmt::format("has a {} that is no integer", key));
    return text[key].get<int64_t>();
  };
  const auto same = [&](const char* key, int64_t expected) {
    if (const int64_t found = integer(key, expected); found != expected)
      refuse(fmt::format("says {} {}, the weights {}", key, found, expected));
  };
  same("hidden_size", config.hidden);
  same("num_hidden_layers", config.num_layers);
  same("intermediate_size", config.mlp);
  same("vocab_size", config.vocabulary);
  same("max_position_embeddings", config.num_positions);
  const std::string act = text.value("hidden_act", nlohmann::json("quick_gelu")).dump();
  if (act != "\"quick_gelu\"")
    refuse("has hidden_act " + printable(act) + ", CLIP-L's is quick_gelu");
  const auto epsilon = text.value("layer_norm_eps", nlohmann::json(kNormEpsilon));
  if (!epsilon.is_number() || std::abs(epsilon.get<double>() - kNormEpsilon) > 1e-9)
    refuse("has layer_norm_eps " + printable(epsilon.dump()) + ", CLIP-L's is 1e-05");
  config.num_heads = integer("num_attention_heads", 0);
  if (config.num_heads < 1 || config.hidden % config.num_heads)
    refuse(fmt::format(
        "has num_attention_heads {} for a width of {}", config.num_heads, config.hidden));
  if (const int64_t eos = integer("eos_token_id", kLegacyEosTokenId); eos != kLegacyEosTokenId) {
    if (eos < 0 || eos >= config.vocabulary)
      refuse(fmt::format("has eos_token_id {} outside the vocabulary", eos));
    config.eos_id = eos;
  }
}

/// Everything but what config.json would say.
Config sizes_from_weights(const TensorMap& canonical, const std::filesystem::path& path) {
  const auto size = [&](const std::string& name, int64_t dim) {
    return size_for_config(path, "a CLIP text encoder", canonical, name, dim, kHint);
  };
  Config config;
  config.vocabulary = size(kTokens, 0);
  config.hidden = size(kTokens, 1);
  config.num_positions = size(kPositions, 0);
  if (config.hidden == kClipGHidden)
    throw InputError(
        fmt::format("{}: this is CLIP-G (1280 wide), which FLUX.1 does not use", show(path)),
        kHint);
  if (config.vocabulary < 1 || config.hidden < 1 || config.num_positions < 1)
    throw InputError(fmt::format("{}: not a CLIP text encoder: an empty embedding", show(path)),
                     kHint);
  config.eos_id = config.vocabulary - 1;
  config.mlp = size(layer(0) + "mlp.fc1.weight", 0);
  config.num_layers = 0;
  for (auto next = canonical.lower_bound(layer(0));
       next != canonical.end() && next->first.starts_with(layer(config.num_layers));
       next = canonical.lower_bound(layer(config.num_layers)))
    ++config.num_layers;
  return config;
}

}  // namespace

bool is_clip_config(const nlohmann::json& config_json) {
  if (!config_json.is_object()) return false;
  if (config_json.contains("text_config")) return true;
  const auto type = config_json.value("model_type", nlohmann::json());
  if (type == "clip" || type == "clip_text_model") return true;
  const auto architectures = config_json.value("architectures", nlohmann::json());
  return architectures.is_array() && architectures.size() == 1 && architectures[0].is_string() &&
         architectures[0].get<std::string>().starts_with("CLIP");
}

ShapeMap tensor_shapes(const Config& config) {
  const int64_t h = config.hidden;
  ShapeMap shapes{{kTokens, {config.vocabulary, h}}, {kPositions, {config.num_positions, h}}};
  const auto affine = [&](const std::string& name, std::vector<int64_t> weight) {
    shapes[name + ".bias"] = {weight[0]};
    shapes[name + ".weight"] = std::move(weight);
  };
  for (int64_t i = 0; i < config.num_layers; ++i) {
    for (const char* name : {"q_proj", "k_proj", "v_proj", "out_proj"})
      affine(layer(i) + "self_attn." + name, {h, h});
    affine(layer(i) + "layer_norm1", {h});
    affine(layer(i) + "layer_norm2", {h});
    affine(layer(i) + "mlp.fc1", {config.mlp, h});
    affine(layer(i) + "mlp.fc2", {h, config.mlp});
  }
  affine("text_model.final_layer_norm", {h});
  return shapes;
}

Config Config::from_weights(const TensorMap& canonical,
                            const nlohmann::json* config_json,
                            const std::filesystem::path& path) {
  Config config = sizes_from_weights(canonical, path);
  if (config_json) {
    apply(*config_json, config, path);
  } else if (config.hidden % kHeadSize == 0) {
    config.num_heads = config.hidden / kHeadSize;
  } else {
    throw InputError(
        fmt::format("{}: a CLIP {} wide: its number of heads cannot be told from the weights",
                    show(path),
                    config.hidden),
        "put the config.json that belongs to it into the same folder");
  }
  return config;
}

TensorMap canonical(const NetTensors& net) {
  TensorMap renamed;
  for (const auto& [name, tensor] : net.tensors) {
    const bool bare = name.starts_with("embeddings.") || name.starts_with("encoder.") ||
                      name.starts_with("final_layer_norm.");
    if (!renamed.emplace(bare ? "text_model." + name : name, tensor).second)
      throw InputError(fmt::format(
          "{}: {} is there twice, with and without text_model.", show(net.path), printable(name)));
  }
  return expect_tensors(net.path,
                        net_title(NetKind::kClip),
                        renamed,
                        tensor_shapes(sizes_from_weights(renamed, net.path)),
                        {"text_model.embeddings.position_ids",
                         "text_projection.weight",
                         "text_projection",
                         "logit_scale",
                         "vision_model.*",
                         "visual_projection.*"});
}

}  // namespace flux::clip
