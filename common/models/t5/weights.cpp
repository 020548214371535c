#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <string>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/models/t5/t5.h"
#include "common/tensor/tensor.h"

namespace flux::t5 {
namespace {

constexpr const char* kHint =
    "FLUX.1 takes the T5-XXL v1.1 encoder: t5xxl_fp16.safetensors, or the text_encoder_2 folder";
constexpr const char* kShared = "shared.weight";
constexpr const char* kEmbedTokens = "encoder.embed_tokens.weight";
constexpr const char* kBias =
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";

std::string block(int64_t i) { return "encoder.block." + std::to_string(i) + "."; }

}  // namespace

ShapeMap tensor_shapes(const Config& config) {
  const int64_t inner = config.num_heads * config.head_size;
  ShapeMap shapes{{kShared, {config.vocabulary, config.width}},
                  {kBias, {kNumBuckets, config.num_heads}},
                  {"encoder.final_layer_norm.weight", {config.width}}};
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string attention = block(i) + "layer.0.", mlp = block(i) + "layer.1.";
    for (const char* name : {"q", "k", "v"})
      shapes[attention + "SelfAttention." + name + ".weight"] = {inner, config.width};
    shapes[attention + "SelfAttention.o.weight"] = {config.width, inner};
    shapes[attention + "layer_norm.weight"] = {config.width};
    for (const char* name : {"wi_0", "wi_1"})
      shapes[mlp + "DenseReluDense." + name + ".weight"] = {config.mlp, config.width};
    shapes[mlp + "DenseReluDense.wo.weight"] = {config.width, config.mlp};
    shapes[mlp + "layer_norm.weight"] = {config.width};
  }
  return shapes;
}

Config Config::from_weights(const TensorMap& canonical, const std::filesystem::path& path) {
  const auto size = [&](const std::string& name, int64_t dim) {
    return size_for_config(path, "a T5 v1.1 encoder", canonical, name, dim, kHint);
  };
  Config config;
  config.vocabulary = size(kShared, 0);
  config.width = size(kShared, 1);
  config.num_heads = size(kBias, 1);
  const int64_t inner = size(block(0) + "layer.0.SelfAttention.q.weight", 0);
  if (config.vocabulary < 1 || config.width < 1 || config.num_heads < 1 || inner < 1 ||
      inner % config.num_heads)
    throw InputError(
        fmt::format("{}: not a T5 v1.1 encoder: {} rows of q do not split into {} heads",
                    show(path),
                    inner,
                    config.num_heads),
        kHint);
  config.head_size = inner / config.num_heads;
  config.mlp = size(block(0) + "layer.1.DenseReluDense.wi_0.weight", 0);
  config.num_layers = 0;
  for (auto next = canonical.lower_bound(block(0));
       next != canonical.end() && next->first.starts_with(block(config.num_layers));
       next = canonical.lower_bound(block(config.num_layers)))
    ++config.num_layers;
  return config;
}

TensorMap canonical(const NetTensors& net) {
  TensorMap renamed = net.tensors;
  // files of ComfyUI hold the token table under both names
  if (auto twin = renamed.extract(kEmbedTokens); twin && !renamed.contains(kShared)) {
    twin.key() = kShared;
    renamed.insert(std::move(twin));
  }
  const Config config = Config::from_weights(renamed, net.path);
  return expect_tensors(net.path,
                        net_title(NetKind::kT5),
                        renamed,
                        tensor_shapes(config),
                        {"decoder.*", "lm_head.*", "logit_scale"});
}

}  // namespace flux::t5
