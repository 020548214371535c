#include "common/models/clip/clip.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/tensor/tensor.h"

namespace flux::clip {
namespace {

using at::Tensor;

constexpr double kNormEpsilon = 1e-5;

}  // namespace

Tensor layer_norm(const Tensor& x, const Affine& norm, at::ScalarType dtype) {
  return at::layer_norm(x, {x.size(1)}, norm.weight, norm.bias, kNormEpsilon).to(dtype);
}

Tensor quick_gelu(const Tensor& x) {
  const Tensor y = x.to(at::kFloat);
  return (y * at::sigmoid(1.702 * y)).to(x.scalar_type());
}

namespace {

Tensor linear(const Tensor& x, const Affine& affine) {
  return at::linear(x, affine.weight, affine.bias);
}

Tensor attend(const Tensor& n, const Layer& layer, const Config& config) {
  const int64_t length = n.size(0), head_size = config.hidden / config.num_heads;
  const Tensor qkv = linear(n, layer.qkv)
                         .view({1, length, 3, config.num_heads, head_size})
                         .transpose(1, 3);  // [1, A, 3, L, d]
  const Tensor y = at::scaled_dot_product_attention(qkv.select(2, 0),
                                                    qkv.select(2, 1),
                                                    qkv.select(2, 2),
                                                    {},
                                                    /*dropout_p=*/0.0,
                                                    /*is_causal=*/true);
  return linear(y.transpose(1, 2).reshape({length, config.hidden}), layer.out);  // [L, hidden]
}

/// Place of the first end token in a row. Padding is the same token, hence "first".
int64_t end_position(const Tensor& row, int64_t eos_id) {
  const int64_t* first = row.const_data_ptr<int64_t>();
  const int64_t* last = first + row.numel();
  const int64_t* found = std::find(first, last, eos_id);
  if (found == last)
    throw std::invalid_argument(fmt::format("a row of ids has no end token {}", eos_id));
  return found - first;
}

}  // namespace

TextModel TextModel::load(const TensorMap& weights,
                          const Config& config,
                          at::ScalarType dtype,
                          at::Device device) {
  const c10::InferenceMode no_grad;
  const auto take = [&](const std::string& name, at::ScalarType type) {
    return to_dtype(weights.at(name), type).to(device);
  };
  const auto affine = [&](const std::string& name, at::ScalarType type) {
    return Affine{take(name + ".weight", type), take(name + ".bias", type)};
  };
  TextModel model;
  model.config = config;
  model.dtype = dtype;
  model.token_embedding = take("text_model.embeddings.token_embedding.weight", at::kFloat);
  model.position_embedding = take("text_model.embeddings.position_embedding.weight", at::kFloat);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string name = fmt::format("text_model.encoder.layers.{}.", i);
    const Affine q = affine(name + "self_attn.q_proj", dtype),
                 k = affine(name + "self_attn.k_proj", dtype),
                 v = affine(name + "self_attn.v_proj", dtype);
    Layer layer;
    layer.norm1 = affine(name + "layer_norm1", at::kFloat);
    layer.qkv = {at::cat({q.weight, k.weight, v.weight}), at::cat({q.bias, k.bias, v.bias})};
    layer.out = affine(name + "self_attn.out_proj", dtype);
    layer.norm2 = affine(name + "layer_norm2", at::kFloat);
    layer.fc1 = affine(name + "mlp.fc1", dtype);
    layer.fc2 = affine(name + "mlp.fc2", dtype);
    model.layers.push_back(std::move(layer));
  }
  model.final_norm = affine("text_model.final_layer_norm", at::kFloat);
  return model;
}

Output TextModel::encode(const Tensor& ids) const {
  if (ids.dim() != 2 || ids.numel() == 0 || ids.size(1) > config.num_positions ||
      ids.scalar_type() != at::kLong)
    throw std::invalid_argument("ids have shape " + shape_text(ids) +
                                ", expected [B, L] int64 with L at most " +
                                std::to_string(config.num_positions));
  const c10::InferenceMode no_grad;
  const Tensor host_ids = ids.cpu().contiguous();
  const auto low = host_ids.min().item<int64_t>(), high = host_ids.max().item<int64_t>();
  if (low < 0 || high >= config.vocabulary)
    throw std::invalid_argument(fmt::format(
        "token id {} is outside CLIP's vocabulary of {}", low < 0 ? low : high, config.vocabulary));

  std::vector<Tensor> states, pooled;
  for (int64_t i = 0; i < ids.size(0); ++i) {
    const Tensor row = host_ids.select(0, i);
    const int64_t end = end_position(row, config.eos_id);
    Tensor x =
        token_embedding.index_select(0, row.to(token_embedding.device())) +
        position_embedding.narrow(0, 0, row.size(0));  // [L, hidden] float32: the residual stream
    for (const Layer& layer : layers) {
      x.add_(attend(layer_norm(x, layer.norm1, dtype), layer, config));
      x.add_(linear(quick_gelu(linear(layer_norm(x, layer.norm2, dtype), layer.fc1)), layer.fc2));
    }
    x = layer_norm(x, final_norm, at::kFloat);
    pooled.push_back(x.select(0, end));
    states.push_back(std::move(x));
  }
  return {at::stack(pooled), at::stack(states)};
}

}  // namespace flux::clip
