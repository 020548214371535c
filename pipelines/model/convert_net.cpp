#include "pipelines/model/convert_net.h"

#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/engine/tensor_file.h"
#include "common/models/clip/clip.h"
#include "common/models/t5/t5.h"
#include "common/models/vae/vae.h"
#include "common/tensor/tensor.h"
#include "formats/safetensors/set_writer.h"

namespace flux::model {
namespace {

/// Largest magnitude, some values at a time; NaN or infinite if one is.
double largest(const at::Tensor& tensor) {
  constexpr int64_t kChunk = int64_t{1} << 22;
  const at::Tensor flat = tensor.flatten();
  double most = 0;
  for (int64_t first = 0; first < flat.numel() && std::isfinite(most); first += kChunk) {
    const at::Tensor part = flat.narrow(0, first, std::min(kChunk, flat.numel() - first));
    const double value = to_dtype(part, at::kFloat).abs().max().item<double>();
    most = std::isnan(value) ? value : std::max(most, value);
  }
  return most;
}

/// The 1x1 convolutions of the attention, which diffusers keeps as matrices.
bool is_vae_matrix(std::string_view bfl) {
  if (bfl.find(".mid.attn_1.") == std::string_view::npos || !bfl.ends_with(".weight")) return false;
  return bfl.find(".norm.") == std::string_view::npos;
}

/// config.json of diffusers' AutoencoderKL.
std::string vae_config_json(const vae::Config& c) {
  const size_t levels = c.channel_mult.size();
  std::vector<int64_t> widths;
  for (const int64_t mult : c.channel_mult) widths.push_back(mult * c.channels);
  const nlohmann::json json{
      {"_class_name", "AutoencoderKL"},
      {"act_fn", "silu"},
      {"block_out_channels", widths},
      {"down_block_types", std::vector<std::string>(levels, "DownEncoderBlock2D")},
      {"up_block_types", std::vector<std::string>(levels, "UpDecoderBlock2D")},
      {"force_upcast", true},
      {"in_channels", c.image_channels},
      {"out_channels", c.image_channels},
      {"latent_channels", c.latent_channels},
      {"layers_per_block", c.num_res_blocks},
      {"mid_block_add_attention", true},
      {"norm_num_groups", 32},
      {"sample_size", 1024},
      {"scaling_factor", 0.3611},
      {"shift_factor", 0.1159},
      {"use_post_quant_conv", false},
      {"use_quant_conv", false}};
  return json.dump(2) + "\n";
}

}  // namespace

void require_finite(const at::Tensor& tensor,
                    const std::string& name,
                    const std::filesystem::path& path) {
  if (tensor.is_floating_point() && !std::isfinite(largest(tensor)))
    throw InputError(fmt::format("{}: tensor {} holds infinite values or NaN", show(path), name),
                     "the file is damaged: download it again");
}

at::Tensor narrowed(const at::Tensor& tensor,
                    c10::ScalarType type,
                    const std::string& name,
                    const std::filesystem::path& path) {
  if (type == tensor.scalar_type()) return tensor;
  at::Tensor out = to_dtype(tensor, type);
  require_finite(tensor, name, path);
  const double most = largest(tensor);
  // float8 has no infinity: what is too large becomes its largest value
  const bool fits = type != at::kFloat8_e4m3fn || most <= 448;
  if (!fits || !std::isfinite(largest(out)))
    throw InputError(fmt::format("{}: tensor {} holds values up to {:.4g}, too large for {}",
                                 show(path),
                                 name,
                                 most,
                                 dtype_name(dtype_of(type))),
                     "choose another --dtype");
  return out;
}

std::string vae_diffusers_name(const std::string& bfl, size_t num_levels) {
  constexpr std::pair<std::string_view, std::string_view> kRenames[] = {
      {".down.", ".down_blocks."},
      {".up.", ".up_blocks."},
      {".mid.block_1.", ".mid_block.resnets.0."},
      {".mid.block_2.", ".mid_block.resnets.1."},
      {".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."},
      {".mid.attn_1.q.", ".mid_block.attentions.0.to_q."},
      {".mid.attn_1.k.", ".mid_block.attentions.0.to_k."},
      {".mid.attn_1.v.", ".mid_block.attentions.0.to_v."},
      {".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."},
      {".block.", ".resnets."},
      {".downsample.", ".downsamplers.0."},
      {".upsample.", ".upsamplers.0."},
      {".nin_shortcut.", ".conv_shortcut."},
      {".norm_out.", ".conv_norm_out."},
  };
  std::string name = bfl;
  for (const auto& [from, to] : kRenames)
    if (const size_t at = name.find(from); at != std::string::npos)
      name.replace(at, from.size(), to);
  // diffusers counts the decoder's levels in the order they run
  constexpr std::string_view kUp = "decoder.up_blocks.";
  if (name.starts_with(kUp)) {
    char& digit = name[kUp.size()];
    digit = static_cast<char>('0' + static_cast<int>(num_levels) - 1 - (digit - '0'));
  }
  return name;
}

ConvertReport convert_net(const ConvertOptions& options, NetKind kind) {
  const bool autoencoder = kind == NetKind::kAutoEncoder;
  if (options.quantize)
    throw UsageError(fmt::format("--quantize: {} is no FLUX transformer", show(options.in)),
                     "leave it out; --dtype changes the type of other nets");
  if (!autoencoder && options.layout)
    throw UsageError(fmt::format("--layout: a {} has one layout only", net_title(kind)),
                     "leave it out");
  const engine::TensorFile files(options.in, engine::kDefaultFileAccess);
  const NetTensors net = take_net(files.contents(), kind);
  const TensorMap tensors = autoencoder            ? vae::canonical(net)
                            : kind == NetKind::kT5 ? t5::canonical(net)
                                                   : clip::canonical(net);
  std::optional<vae::Config> config;
  if (autoencoder) config = vae::Config::from_weights(tensors, options.in);
  const bool is_diffusers = autoencoder && std::ranges::any_of(tensors, [&](const auto& entry) {
                              return !net.tensors.contains(entry.first);
                            });
  const bool diffusers =
      autoencoder && options.layout.value_or(is_diffusers ? dit::ModelLayout::kDiffusers
                                                          : dit::ModelLayout::kBfl) ==
                         dit::ModelLayout::kDiffusers;

  struct Item {
    std::string name;  // in the file to be written
    at::Tensor stand_in;
    std::vector<int64_t> shape;
    c10::ScalarType type{};
  };
  std::vector<Item> items;
  std::vector<safetensors::TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) {
    Item item{name, tensor, tensor.sizes().vec(), tensor.scalar_type()};
    if (options.dtype && tensor.is_floating_point()) item.type = *scalar_type(*options.dtype);
    if (diffusers) {
      item.name = vae_diffusers_name(name, config->channel_mult.size());
      if (is_vae_matrix(name)) item.shape.resize(2);
    }
    specs.push_back({item.name, dtype_of(item.type), item.shape});
    items.push_back(std::move(item));
  }
  auto metadata = net.metadata;
  metadata.merge(safetensors::pt_metadata());
  metadata[kConvertedKey] = fmt::format("flux-model {}", tool_version());
  const safetensors::SetPlace place{options.out,
                                    diffusers ? "diffusion_pytorch_model" : "model",
                                    static_cast<uint64_t>(options.shard_bytes)};
  safetensors::SetWriter writer(place, specs, metadata, kConvertedKey, "flux-model convert");
  Progress progress("convert", "MB", static_cast<int64_t>(writer.total_bytes() / kProgressUnit));
  for (const Item& item : items) {
    cancel::check();
    const at::Tensor tensor = at::empty(item.shape, item.stand_in.scalar_type());
    if (tensor.numel() > 0)
      files.read_values(files.stored(item.stand_in),
                        0,
                        tensor.numel(),
                        tensor.scalar_type(),
                        static_cast<std::byte*>(tensor.data_ptr()));
    writer.write(item.name, host_bytes(narrowed(tensor, item.type, item.name, options.in)));
    progress.update(static_cast<int64_t>(writer.written_bytes() / kProgressUnit));
  }
  if (diffusers && place.folder() == place.out)
    write_file_atomic(place.out / "config.json", vae_config_json(*config));
  writer.commit();
  ConvertReport report;
  report.file = writer.path();
  report.files = writer.num_files();
  report.layout = !autoencoder ? "hf" : diffusers ? "diffusers" : "bfl";
  report.tensors = std::ssize(items);
  report.bytes = static_cast<int64_t>(writer.total_bytes());
  return report;
}

}  // namespace flux::model
