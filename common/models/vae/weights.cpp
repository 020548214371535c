#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/models/vae/vae.h"
#include "common/tensor/tensor.h"

namespace flux::vae {
namespace {

constexpr const char* kHint =
    "FLUX.1's autoencoder is ae.safetensors, or the vae folder of a diffusers download";

/// diffusers' names, the oldest ones too, in BFL's; each rule applies once, in this order.
constexpr std::array<std::pair<std::string_view, std::string_view>, 19> kRenames{{
    {".down_blocks.", ".down."},
    {".up_blocks.", ".up."},
    {".mid_block.resnets.0.", ".mid.block_1."},
    {".mid_block.resnets.1.", ".mid.block_2."},
    {".mid_block.attentions.0.", ".mid.attn_1."},
    {".resnets.", ".block."},
    {".downsamplers.0.", ".downsample."},
    {".upsamplers.0.", ".upsample."},
    {".conv_shortcut.", ".nin_shortcut."},
    {".conv_norm_out.", ".norm_out."},
    {".group_norm.", ".norm."},
    {".to_q.", ".q."},
    {".to_k.", ".k."},
    {".to_v.", ".v."},
    {".to_out.0.", ".proj_out."},
    {".query.", ".q."},
    {".key.", ".k."},
    {".value.", ".v."},
    {".proj_attn.", ".proj_out."},
}};
constexpr std::string_view kUp = "decoder.up_blocks.";

/// The level number after `prefix` in `name`, or -1.
int64_t level_after(std::string_view prefix, std::string_view name) {
  if (!name.starts_with(prefix) || name.size() == prefix.size()) return -1;
  const char digit = name[prefix.size()];
  return digit >= '0' && digit <= '9' ? digit - '0' : -1;
}

/// diffusers counts the decoder's levels in the order they run, BFL the other way round.
std::string bfl_name(std::string name, int64_t num_up_levels) {
  if (const int64_t level = level_after(kUp, name); level >= 0 && level < num_up_levels)
    name[kUp.size()] = static_cast<char>('0' + num_up_levels - 1 - level);
  for (const auto& [from, to] : kRenames)
    if (const size_t at = name.find(from); at != std::string::npos)
      name.replace(at, from.size(), to);
  return name;
}

bool has_half(const TensorMap& weights, const std::string& prefix) {
  const auto first = weights.lower_bound(prefix);
  return first != weights.end() && first->first.starts_with(prefix);
}

TensorMap half(const TensorMap& weights,
               const std::string& prefix,
               const std::filesystem::path& path,
               const char* title) {
  TensorMap result;
  for (auto it = weights.lower_bound(prefix); it != weights.end() && it->first.starts_with(prefix);
       ++it)
    result.insert(*it);
  if (result.empty())
    throw InputError(
        fmt::format(
            "{}: this file holds no {}, only the other half of an autoencoder", show(path), title),
        kHint);
  return result;
}

/// Names and shapes, by black-forest-labs/flux, src/flux/modules/autoencoder.py.
class Shapes {
 public:
  void conv(const std::string& name, int64_t in, int64_t out, int64_t kernel) {
    shapes_[name + ".weight"] = {out, in, kernel, kernel};
    shapes_[name + ".bias"] = {out};
  }
  void norm(const std::string& name, int64_t channels) {
    shapes_[name + ".weight"] = {channels};
    shapes_[name + ".bias"] = {channels};
  }
  void res_block(const std::string& name, int64_t in, int64_t out) {
    norm(name + ".norm1", in);
    conv(name + ".conv1", in, out, 3);
    norm(name + ".norm2", out);
    conv(name + ".conv2", out, out, 3);
    if (in != out) conv(name + ".nin_shortcut", in, out, 1);
  }
  void middle(const std::string& name, int64_t channels) {
    res_block(name + ".block_1", channels, channels);
    norm(name + ".attn_1.norm", channels);
    for (const char* part : {".q", ".k", ".v", ".proj_out"})
      conv(name + ".attn_1" + part, channels, channels, 1);
    res_block(name + ".block_2", channels, channels);
  }

  void encoder(const Config& config) {
    conv("encoder.conv_in", config.image_channels, config.channels, 3);
    int64_t width = config.channels;
    for (size_t l = 0; l < config.channel_mult.size(); ++l) {
      const std::string level = "encoder.down." + std::to_string(l);
      const int64_t out = config.channels * config.channel_mult[l];
      for (int64_t b = 0; b < config.num_res_blocks; ++b, width = out)
        res_block(level + ".block." + std::to_string(b), width, out);
      if (l + 1 < config.channel_mult.size()) conv(level + ".downsample.conv", out, out, 3);
    }
    middle("encoder.mid", width);
    norm("encoder.norm_out", width);
    conv("encoder.conv_out", width, 2 * config.latent_channels, 3);
  }
  void decoder(const Config& config) {
    int64_t width = config.channels * config.channel_mult.back();
    conv("decoder.conv_in", config.latent_channels, width, 3);
    middle("decoder.mid", width);
    for (size_t l = config.channel_mult.size(); l-- > 0;) {
      const std::string level = "decoder.up." + std::to_string(l);
      const int64_t out = config.channels * config.channel_mult[l];
      for (int64_t b = 0; b <= config.num_res_blocks; ++b, width = out)
        res_block(level + ".block." + std::to_string(b), width, out);
      if (l > 0) conv(level + ".upsample.conv", out, out, 3);
    }
    norm("decoder.norm_out", width);
    conv("decoder.conv_out", width, config.image_channels, 3);
  }
  const ShapeMap& map() const { return shapes_; }

 private:
  ShapeMap shapes_;
};

}  // namespace

ShapeMap tensor_shapes(const Config& config) {
  Shapes shapes;
  if (config.has_encoder) shapes.encoder(config);
  if (config.has_decoder) shapes.decoder(config);
  return shapes.map();
}

Config Config::from_weights(const TensorMap& canonical, const std::filesystem::path& path) {
  const auto size = [&](const std::string& name, int64_t dim) {
    return size_for_config(path, "a FLUX autoencoder", canonical, name, dim, kHint);
  };
  Config config;
  config.has_encoder = has_half(canonical, "encoder.");
  config.has_decoder = has_half(canonical, "decoder.");
  if (!config.has_encoder && !config.has_decoder)
    throw InputError(
        fmt::format("{}: not a FLUX autoencoder: no encoder and no decoder in it", show(path)),
        kHint);
  const bool enc = config.has_encoder;
  config.channels = enc ? size("encoder.conv_in.weight", 0) : size("decoder.norm_out.weight", 0);
  config.image_channels =
      enc ? size("encoder.conv_in.weight", 1) : size("decoder.conv_out.weight", 0);
  config.latent_channels =
      enc ? size("encoder.conv_out.weight", 0) / 2 : size("decoder.conv_in.weight", 1);
  if (config.latent_channels != 16)
    throw InputError(fmt::format("{}: an autoencoder with {} latent channels, FLUX.1's has 16{}",
                                 show(path),
                                 config.latent_channels,
                                 config.latent_channels == 4    ? " (4: Stable Diffusion's)"
                                 : config.latent_channels == 32 ? " (32: FLUX.2's)"
                                                                : ""),
                     kHint);
  if (config.channels < 32 || config.channels % 32)
    throw InputError(
        fmt::format("{}: an autoencoder of {} channels; its norms need a multiple of 32",
                    show(path),
                    config.channels),
        kHint);

  const std::string levels = enc ? "encoder.down." : "decoder.up.";
  config.channel_mult.clear();
  for (int64_t l = 0; has_half(canonical, levels + std::to_string(l) + "."); ++l) {
    const int64_t out = size(levels + std::to_string(l) + ".block.0.conv1.weight", 0);
    if (out < 1 || out % config.channels)
      throw InputError(
          fmt::format("{}: level {} of the autoencoder has {} channels, no multiple of {}",
                      show(path),
                      l,
                      out,
                      config.channels),
          kHint);
    config.channel_mult.push_back(out / config.channels);
  }
  config.num_res_blocks = 0;
  while (has_half(canonical, levels + "0.block." + std::to_string(config.num_res_blocks) + "."))
    ++config.num_res_blocks;
  if (!enc) --config.num_res_blocks;
  if (config.channel_mult.empty() || config.num_res_blocks < 1)
    throw InputError(
        fmt::format("{}: not a FLUX autoencoder: no level {}0 with blocks", show(path), levels),
        kHint);
  return config;
}

TensorMap canonical(const NetTensors& net) {
  int64_t num_up_levels = 0;
  for (const auto& [name, tensor] : net.tensors)
    num_up_levels = std::max(num_up_levels, level_after(kUp, name) + 1);

  TensorMap renamed;
  for (const auto& [name, tensor] : net.tensors) {
    std::string bfl = bfl_name(name, num_up_levels);
    // diffusers keeps the 1x1 convolutions of the attention as matrices
    const bool matrix = bfl.find(".mid.attn_1.") != std::string::npos && tensor.dim() == 2;
    if (!renamed.emplace(std::move(bfl), matrix ? tensor.unsqueeze(-1).unsqueeze(-1) : tensor)
             .second)
      throw InputError(fmt::format(
          "{}: {} is there twice, in BFL and in diffusers names", show(net.path), printable(name)));
  }
  const Config config = Config::from_weights(renamed, net.path);
  return expect_tensors(net.path, net_title(NetKind::kAutoEncoder), renamed, tensor_shapes(config));
}

TensorMap encoder_half(const TensorMap& canonical, const std::filesystem::path& path) {
  return half(canonical, "encoder.", path, "encoder");
}
TensorMap decoder_half(const TensorMap& canonical, const std::filesystem::path& path) {
  return half(canonical, "decoder.", path, "decoder");
}

}  // namespace flux::vae
