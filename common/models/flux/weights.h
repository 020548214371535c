// common/models/flux/weights.h - the tensors of a FLUX transformer, by their original (BFL) names.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common/models/flux/config.h"
#include "common/ops/linear.h"

namespace flux::dit {

/// in_layer, SiLU, out_layer: of the timestep, the guidance and the pooled embedding.
struct Embedder {
  Linear in_layer, out_layer;
};

/// Image or text half of a double block.
struct Stream {
  Linear mod;                         // mod.lin            H -> 6H
  Linear qkv;                         // attn.qkv           H -> 3H
  at::Tensor query_scale, key_scale;  // attn.norm.*.scale  [head]
  Linear proj;                        // attn.proj          H -> H
  Linear mlp_in, mlp_out;             // mlp.0, mlp.2       H -> M -> H
};

struct DoubleBlock {
  Stream img, txt;
};

struct SingleBlock {
  Linear modulation;                  // modulation.lin  H -> 3H
  Linear linear1;                     // H -> 3H + M: qkv, then the MLP's input
  Linear linear2;                     // H + M -> H: attention, then the MLP
  at::Tensor query_scale, key_scale;  // [head]
};

/// A whole transformer. Copies share the tensors.
struct Weights {
  Linear img_in, txt_in;
  Embedder time_in, vector_in;
  std::optional<Embedder> guidance_in;
  std::vector<DoubleBlock> double_blocks;
  std::vector<SingleBlock> single_blocks;
  Linear final_modulation;  // final_layer.adaLN_modulation.1  H -> 2H: shift, scale
  Linear final_linear;      // final_layer.linear              H -> out_channels
};

/// Calls `visit` with every Linear of the model and its module path
/// ("double_blocks.0.img_attn.qkv"), in the order of a BFL file.
void for_each_linear(Weights& weights,
                     const std::function<void(const std::string& path, Linear& layer)>& visit);
/// The same for one block; `prefix` is "double_blocks.3." or "single_blocks.3.".
void for_each_linear(DoubleBlock& block,
                     const std::string& prefix,
                     const std::function<void(const std::string& path, Linear& layer)>& visit);
void for_each_linear(SingleBlock& block,
                     const std::string& prefix,
                     const std::function<void(const std::string& path, Linear& layer)>& visit);

/// Calls `visit` with every base tensor (no adapters) and its BFL name, in the order of
/// tensor_shapes().
void for_each_tensor(Weights& weights,
                     const std::function<void(const std::string& name, at::Tensor& tensor)>& visit);
void for_each_tensor(DoubleBlock& block,
                     const std::string& prefix,
                     const std::function<void(const std::string& name, at::Tensor& tensor)>& visit);
void for_each_tensor(SingleBlock& block,
                     const std::string& prefix,
                     const std::function<void(const std::string& name, at::Tensor& tensor)>& visit);

/// A Weights of the right form for `config`, all tensors undefined.
Weights empty_weights(const Config& config);

}  // namespace flux::dit
