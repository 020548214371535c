#include "common/models/t5/t5.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <array>
#include <stdexcept>
#include <string>

#include "common/tensor/tensor.h"

namespace flux::t5 {
namespace {

using at::Tensor;

constexpr double kNormEpsilon = 1e-6;

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, at::ScalarType dtype) {
  return (x * at::rsqrt(x.square().mean(-1, true) + kNormEpsilon) * weight).to(dtype);
}

Tensor bias_of_length(const Tensor& table, int64_t length, at::ScalarType dtype) {
  std::vector<int64_t> buckets(static_cast<size_t>(length * length));
  for (int64_t query = 0; query < length; ++query)
    for (int64_t key = 0; key < length; ++key)
      buckets[static_cast<size_t>(query * length + key)] = relative_bucket(key - query);
  const Tensor index =
      from_values<int64_t>(buckets, std::array<int64_t, 1>{length * length}).to(table.device());
  return table.to(dtype).t().contiguous().index_select(1, index).view(
      {1, table.size(1), length, length});
}

namespace {

/// One sample on its way through the layers.
struct Sample {
  Tensor x;     // [live, width] float32: the residual stream
  Tensor live;  // [live] int64: positions that are computed; undefined = all
  Tensor bias;  // [1, heads, live, live]
};

Tensor attend(const Tensor& n, const Layer& layer, const Tensor& bias, const Config& config) {
  const auto heads = [&](const Tensor& weight) {
    return at::linear(n, weight)
        .view({1, n.size(0), config.num_heads, config.head_size})
        .transpose(1, 2);  // [1, A, L, d]
  };
  // T5 does not divide the scores by sqrt(d)
  const Tensor y = at::scaled_dot_product_attention(heads(layer.q),
                                                    heads(layer.k),
                                                    heads(layer.v),
                                                    bias,
                                                    /*dropout_p=*/0.0,
                                                    /*is_causal=*/false,
                                                    /*scale=*/1.0);
  return at::linear(y.transpose(1, 2).reshape({n.size(0), -1}), layer.o);  // [L, width]
}

Tensor feed_forward(const Tensor& n, const Layer& layer) {
  Tensor gate = at::gelu(at::linear(n, layer.wi_0), "tanh");  // [L, mlp]
  gate.mul_(at::linear(n, layer.wi_1));
  return at::linear(gate, layer.wo);
}

void check_ids(const Tensor& ids, const Tensor& mask, int64_t vocabulary) {
  if (ids.dim() != 2 || ids.numel() == 0 || ids.scalar_type() != at::kLong)
    throw std::invalid_argument("ids have shape " + shape_text(ids) + ", expected [B, L] int64");
  if (mask.defined() && mask.sizes() != ids.sizes())
    throw std::invalid_argument("mask has shape " + shape_text(mask) + ", ids " + shape_text(ids));
  const auto low = ids.min().item<int64_t>(), high = ids.max().item<int64_t>();
  if (low < 0 || high >= vocabulary)
    throw std::invalid_argument(fmt::format(
        "token id {} is outside T5's vocabulary of {}", low < 0 ? low : high, vocabulary));
}

}  // namespace

int64_t relative_bucket(int64_t relative) {
  constexpr std::array<int64_t, 8> kFirst{
      8, 12, 16, 23, 32, 46, 64, 91};  // first distance of buckets 8 to 15
  const int64_t distance = relative < 0 ? -relative : relative;
  int64_t bucket = distance;
  if (distance >= kFirst[0]) {
    bucket = 7;
    for (const int64_t first : kFirst) bucket += distance >= first;
  }
  return relative > 0 ? bucket + kNumBuckets / 2 : bucket;
}

Encoder Encoder::load(TensorMap weights,
                      const Config& config,
                      at::ScalarType dtype,
                      at::Device device) {
  const c10::InferenceMode no_grad;
  const auto take = [&](const std::string& name, at::ScalarType type) {
    const auto node = weights.extract(name);
    return to_dtype(node.mapped(), type).to(device);
  };
  Encoder e;
  e.config = config;
  e.dtype = dtype;
  const at::ScalarType table = weights.at("shared.weight").scalar_type();
  e.shared =
      take("shared.weight",
           table == at::kFloat8_e4m3fn ? at::kBFloat16 : table);  // exact, and rows can be selected
  e.position_bias =
      take("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", at::kFloat);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string attention = fmt::format("encoder.block.{}.layer.0.", i),
                      mlp = fmt::format("encoder.block.{}.layer.1.", i);
    const auto linear = [&](const std::string& name) { return take(name + ".weight", dtype); };
    Layer layer;
    layer.norm1 = take(attention + "layer_norm.weight", at::kFloat);
    layer.q = linear(attention + "SelfAttention.q");
    layer.k = linear(attention + "SelfAttention.k");
    layer.v = linear(attention + "SelfAttention.v");
    layer.o = linear(attention + "SelfAttention.o");
    layer.norm2 = take(mlp + "layer_norm.weight", at::kFloat);
    layer.wi_0 = linear(mlp + "DenseReluDense.wi_0");
    layer.wi_1 = linear(mlp + "DenseReluDense.wi_1");
    layer.wo = linear(mlp + "DenseReluDense.wo");
    e.layers.push_back(std::move(layer));
  }
  e.final_norm = take("encoder.final_layer_norm.weight", at::kFloat);
  return e;
}

Tensor Encoder::encode(const Tensor& ids, const Tensor& mask) const {
  check_ids(ids, mask, config.vocabulary);
  const c10::InferenceMode no_grad;
  const at::Device device = final_norm.device();
  const int64_t batch = ids.size(0), length = ids.size(1);
  const Tensor bias = bias_of_length(position_bias, length, dtype);

  std::vector<Sample> samples;
  for (int64_t i = 0; i < batch; ++i) {
    Sample sample{.x = {}, .live = {}, .bias = bias};
    Tensor tokens = ids.select(0, i).to(device);
    if (mask.defined()) {
      sample.live = mask.select(0, i).to(device).nonzero().flatten();
      if (sample.live.numel() == 0)
        throw std::invalid_argument(fmt::format("mask: row {} masks out everything", i));
      tokens = tokens.index_select(0, sample.live);
      sample.bias = bias.index_select(2, sample.live).index_select(3, sample.live);
    }
    sample.x = to_dtype(shared.index_select(0, tokens), at::kFloat);
    samples.push_back(std::move(sample));
  }
  // Layer by layer, each for one sample after the other: a layer's weights are fetched once for the
  // whole batch.
  for (const Layer& layer : layers)
    for (Sample& sample : samples) {
      sample.x.add_(attend(rms_norm(sample.x, layer.norm1, dtype), layer, sample.bias, config));
      sample.x.add_(feed_forward(rms_norm(sample.x, layer.norm2, dtype), layer));
    }

  Tensor result = at::zeros({batch, length, config.width},
                            at::TensorOptions().dtype(at::kFloat).device(device));
  for (int64_t i = 0; i < batch; ++i) {
    const Sample& sample = samples[static_cast<size_t>(i)];
    const Tensor y = rms_norm(sample.x, final_norm, at::kFloat);
    Tensor row = result.select(0, i);
    if (sample.live.defined())
      row.index_copy_(0, sample.live, y);
    else
      row.copy_(y);
  }
  return result;
}

}  // namespace flux::t5
