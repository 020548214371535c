#include "pipelines/model/info.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/engine/model_file.h"
#include "common/models/clip/clip.h"
#include "common/models/flux/load.h"
#include "common/models/t5/t5.h"
#include "common/models/vae/vae.h"
#include "common/models/weights/weights.h"
#include "common/quant/quant.h"
#include "common/tensor/tensor.h"

namespace flux::model {
namespace fs = std::filesystem;
namespace {

using nlohmann::json;

/// A net taken out of a file, under its canonical names.
struct Found {
  const char* word;  // its part of the memo's key
  TensorMap canonical;
  json config;
};

json config_of(const dit::Config& c) {
  return {{"hidden", c.hidden},
          {"num_heads", c.num_heads},
          {"mlp", c.mlp},
          {"num_double_blocks", c.num_double_blocks},
          {"num_single_blocks", c.num_single_blocks},
          {"in_channels", c.in_channels},
          {"out_channels", c.out_channels},
          {"prompt_dim", c.prompt_dim},
          {"pooled_dim", c.pooled_dim},
          {"sinusoid_dim", c.sinusoid_dim},
          {"axes", c.axes},
          {"guidance", c.guidance}};
}

Found read_net(const NetTensors& net, NetKind kind) {
  switch (kind) {
    case NetKind::kFlux: {
      const dit::Config c = dit::read_config(net);
      return {"flux", dit::canonical_tensors(net, c), config_of(c)};
    }
    case NetKind::kAutoEncoder: {
      TensorMap canonical = vae::canonical(net);
      const vae::Config c = vae::Config::from_weights(canonical, net.path);
      return {"vae",
              std::move(canonical),
              {{"channels", c.channels},
               {"channel_mult", c.channel_mult},
               {"num_res_blocks", c.num_res_blocks},
               {"latent_channels", c.latent_channels},
               {"stride", c.stride()},
               {"has_encoder", c.has_encoder},
               {"has_decoder", c.has_decoder}}};
    }
    case NetKind::kT5: {
      TensorMap canonical = t5::canonical(net);
      const t5::Config c = t5::Config::from_weights(canonical, net.path);
      return {"t5",
              std::move(canonical),
              {{"width", c.width},
               {"num_layers", c.num_layers},
               {"num_heads", c.num_heads},
               {"head_size", c.head_size},
               {"mlp", c.mlp},
               {"vocabulary", c.vocabulary}}};
    }
    case NetKind::kClip: {
      TensorMap canonical = clip::canonical(net);
      const fs::path beside =
          (fs::is_directory(net.path) ? net.path : net.path.parent_path()) / "config.json";
      std::error_code error;
      const json beside_json = fs::is_regular_file(beside, error)
                                   ? json::parse(read_file(beside, 1 << 20), nullptr, false)
                                   : json();
      const clip::Config c = clip::Config::from_weights(
          canonical, clip::is_clip_config(beside_json) ? &beside_json : nullptr, net.path);
      return {"clip",
              std::move(canonical),
              {{"hidden", c.hidden},
               {"num_layers", c.num_layers},
               {"num_heads", c.num_heads},
               {"mlp", c.mlp},
               {"num_positions", c.num_positions},
               {"vocabulary", c.vocabulary},
               {"eos_id", c.eos_id}}};
    }
  }
  throw std::invalid_argument("no such net");
}

/// "bfl" or "hf" where the file has the canonical names, else the other layout of that net.
std::string layout_of(const NetTensors& net, const Found& found, NetKind kind) {
  const bool canonical =
      std::all_of(found.canonical.begin(), found.canonical.end(), [&](const auto& entry) {
        return net.tensors.contains(entry.first);
      });
  if (kind == NetKind::kFlux || kind == NetKind::kAutoEncoder)
    return canonical ? "bfl" : "diffusers";
  if (kind == NetKind::kClip) return canonical ? "hf" : "hf without text_model.";
  return canonical ? "hf" : "hf with encoder.embed_tokens";
}

/// A transformer that `convert` wrote.
json describe_quantized(const WeightFile& file, QuantFormat format, bool rehash) {
  const engine::ModelFile model(file.path);
  std::map<std::string, int64_t> dtypes;
  for (const auto& [name, tensor] : file.tensors)
    ++dtypes[std::string(dtype_name(dtype_of(tensor)))];
  return {{"file", printable(file.path.native())},
          {"kind", "flux"},
          {"title", net_title(NetKind::kFlux)},
          {"layout", "bfl"},
          {"prefix", ""},
          {"quantization", stored_quant_name(format)},
          {"config", config_of(model.config())},
          {"dtypes", dtypes},
          {"tensors", file.tensors.size()},
          {"parameters", model.config().num_parameters()},
          {"weights_sha256", to_hex(model.weights_sha256(rehash))}};
}

json describe(const WeightFile& file, NetKind kind, bool rehash) {
  if (kind == NetKind::kFlux)
    if (const auto format = stored_quant_format(file.metadata, file.path))
      return describe_quantized(file, *format, rehash);
  const NetTensors net = take_net(file, kind);
  const Found found = read_net(net, kind);
  std::map<std::string, int64_t> dtypes;
  int64_t num_parameters = 0;
  for (const auto& [name, tensor] : found.canonical) {
    ++dtypes[std::string(dtype_name(dtype_of(tensor)))];
    num_parameters += tensor.numel();
  }
  const auto identity = [&](const std::string& what, const TensorMap& tensors) {
    return to_hex(remembered_weights_sha256(file.stamps, what, tensors, rehash));
  };
  json out{{"file", printable(file.path.native())},
           {"kind", found.word},
           {"title", net_title(kind)},
           {"layout", layout_of(net, found, kind)},
           {"prefix", net.prefix},
           {"config", found.config},
           {"dtypes", dtypes},
           {"tensors", found.canonical.size()},
           {"parameters", num_parameters},
           {"weights_sha256", identity(found.word, found.canonical)}};
  // what a latents cache carries as weights.ae
  if (kind == NetKind::kAutoEncoder && found.config["has_encoder"]) {
    out["encoder_weights_sha256"] =
        identity("vae.encoder", vae::encoder_half(found.canonical, file.path));
  }
  return out;
}

}  // namespace

void add_flags(InfoOptions& options, Tool& tool) {
  tool.about(
      "Says which nets weight files hold: layout, sizes, dtypes and weights_sha256; or why a file "
      "is not supported.",
      "flux-model info flux1-dev.safetensors");
  tool.arguments(
      options.files, "FILE...", "safetensors file, sharded index, first shard, or folder");
  tool.flag(
      "rehash", options.rehash, "compute weights_sha256 anew instead of using the remembered one");
}

void check(const InfoOptions& options) {
  if (options.files.empty())
    throw UsageError("no file given", "flux-model info flux1-dev.safetensors");
}

InfoReport info(const InfoOptions& options) {
  InfoReport report;
  for (const std::string& path : options.files) {
    const WeightFile file = read_weights(path);
    std::vector<NetKind> kinds = nets_in(file);
    if (kinds.empty()) kinds.push_back(NetKind::kFlux);  // its refusal names what the file is
    for (const NetKind kind : kinds) report.nets.push_back(describe(file, kind, options.rehash));
  }
  return report;
}

std::string InfoReport::text() const {
  std::string out;
  for (const json& net : nets) {
    const std::string prefix = net["prefix"];
    out += fmt::format("{}: {}\n  layout          {}{}\n",
                       net["file"].get<std::string>(),
                       net["title"].get<std::string>(),
                       net["layout"].get<std::string>(),
                       prefix.empty() ? "" : " under " + printable(prefix));
    if (const auto format = net.find("quantization"); format != net.end())
      out += fmt::format("  quantization    {}\n", format->get<std::string>());
    std::string config, dtypes;
    for (const auto& [key, value] : net["config"].items())
      config += fmt::format(" {}={}", key, value.dump());
    for (const auto& [key, value] : net["dtypes"].items())
      dtypes += fmt::format("{}{} x {}", dtypes.empty() ? "" : ", ", value.dump(), key);
    out += fmt::format(
        "  config         {}\n  tensors         {} ({})\n  parameters      {}\n  weights_sha256  "
        "{}\n",
        config,
        net["tensors"].dump(),
        dtypes,
        net["parameters"].dump(),
        net["weights_sha256"].get<std::string>());
    if (const auto half = net.find("encoder_weights_sha256"); half != net.end())
      out += fmt::format("  its encoder     {}\n", half->get<std::string>());
  }
  if (!out.empty()) out.pop_back();
  return out;
}

}  // namespace flux::model
