#include "common/models/t5/t5.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <array>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/tensor/tensor.h"

namespace flux::t5 {
namespace {

using at::Tensor;

constexpr double kNormEpsilon = 1e-6;

/// 1 / sqrt(mean(x^2) + eps); several sums at once, so that they become vector instructions.
float rms_factor(const float* values, int64_t width) {
  constexpr int64_t kSums = 16;
  std::array<float, kSums> sums{};
  int64_t i = 0;
  for (; i + kSums <= width; i += kSums) {
    for (int64_t k = 0; k < kSums; ++k) {
      const float value = values[i + k];
      sums[static_cast<size_t>(k)] += value * value;
    }
  }
  double sum = 0;
  for (const float part : sums) sum += static_cast<double>(part);
  for (; i < width; ++i) sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  return static_cast<float>(1 / std::sqrt(sum / static_cast<double>(width) + kNormEpsilon));
}

template <class T>
void scale_row(const float* values, const float* scale, float factor, int64_t width, T* out) {
  for (int64_t i = 0; i < width; ++i) out[i] = static_cast<T>(values[i] * factor * scale[i]);
}

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

/// Rows of the matrix products of masked captions: they are packed one after the other and cut into
/// tiles of this size, since a product's bits depend on how many rows it has, and its speed too
/// (weights are read for each tile). The last tile is filled up with zeros.
constexpr int64_t kTileRows = 256;

/// One caption among the packed rows.
struct Sample {
  int64_t begin = 0, rows = 0;
  Tensor live;  // [rows] int64: positions that are computed; undefined = all
  Tensor bias;  // [1, heads, rows, rows]
};

/// The rows of all captions on their way through the layers, and memory for what is between, which is
/// kept from layer to layer: fresh pages took an eighth of the time.
struct Packed {
  Tensor x;           // [R, width] float32: the residual stream
  Tensor q, k, v, y;  // [R, heads * head_size] in the dtype of the linear layers, as all below
  int64_t tile_rows = 0;
  Tensor n, out;    // [tile_rows, width]
  Tensor gate, up;  // [tile_rows, mlp]
};

/// rms_norm(x) into `out` [L, width].
void rms_norm_into(const Tensor& x, const Tensor& weight, Tensor& out) {
  const at::ScalarType type = out.scalar_type();
  if (!x.is_cpu() || !x.is_contiguous() || (type != at::kBFloat16 && type != at::kFloat)) {
    out.copy_(rms_norm(x, weight, type));
    return;
  }
  const int64_t width = x.size(1);
  const float *from = x.const_data_ptr<float>(), *scale = weight.const_data_ptr<float>();
  at::parallel_for(0, x.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* const values = from + row * width;
      const float factor = rms_factor(values, width);
      if (type == at::kFloat)
        scale_row(values, scale, factor, width, out.mutable_data_ptr<float>() + row * width);
      else
        scale_row(values, scale, factor, width, out.mutable_data_ptr<at::BFloat16>() + row * width);
    }
  });
}

void attend(const Sample& sample, const Config& config, const Packed& p) {
  const auto heads = [&](const Tensor& rows) {
    return rows.narrow(0, sample.begin, sample.rows)
        .view({1, sample.rows, config.num_heads, config.head_size})
        .transpose(1, 2);  // [1, A, L, d]
  };
  // T5 does not divide the scores by sqrt(d)
  heads(p.y).copy_(at::scaled_dot_product_attention(heads(p.q),
                                                    heads(p.k),
                                                    heads(p.v),
                                                    sample.bias,
                                                    /*dropout_p=*/0.0,
                                                    /*is_causal=*/false,
                                                    /*scale=*/1.0));
}

void run_layer(const Layer& layer,
               const Config& config,
               const std::vector<Sample>& samples,
               Packed& p) {
  const auto each_tile = [&](auto&& body) {
    for (int64_t row = 0; row < p.x.size(0); row += p.tile_rows)
      body([&, row](const Tensor& rows) { return rows.narrow(0, row, p.tile_rows); });
  };
  const auto product = [](const Tensor& rows, const Tensor& weight, Tensor out) {
    at::mm_out(out, rows, weight.t());
  };
  each_tile([&](auto&& tile) {
    rms_norm_into(tile(p.x), layer.norm1, p.n);
    product(p.n, layer.q, tile(p.q));
    product(p.n, layer.k, tile(p.k));
    product(p.n, layer.v, tile(p.v));
  });
  for (const Sample& sample : samples) attend(sample, config, p);
  each_tile([&](auto&& tile) {
    product(tile(p.y), layer.o, p.out);
    tile(p.x).add_(p.out);
    rms_norm_into(tile(p.x), layer.norm2, p.n);
    product(p.n, layer.wi_0, p.gate);
    at::gelu_(p.gate, "tanh");
    product(p.n, layer.wi_1, p.up);
    p.gate.mul_(p.up);
    product(p.gate, layer.wo, p.out);
    tile(p.x).add_(p.out);
  });
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
  std::vector<Tensor> embedded;
  int64_t num_rows = 0;
  for (int64_t i = 0; i < batch; ++i) {
    Sample sample{.begin = num_rows, .rows = length, .live = {}, .bias = bias};
    Tensor tokens = ids.select(0, i).to(device);
    if (mask.defined()) {
      sample.live = mask.select(0, i).to(device).nonzero().flatten();
      sample.rows = sample.live.numel();
      if (sample.rows == 0)
        throw std::invalid_argument(fmt::format("mask: row {} masks out everything", i));
      tokens = tokens.index_select(0, sample.live);
      sample.bias = bias.index_select(2, sample.live).index_select(3, sample.live);
    }
    embedded.push_back(to_dtype(shared.index_select(0, tokens), at::kFloat));
    num_rows += sample.rows;
    samples.push_back(std::move(sample));
  }

  Packed p;
  p.tile_rows = mask.defined() ? kTileRows : length;
  const int64_t padding = (p.tile_rows - num_rows % p.tile_rows) % p.tile_rows;
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  if (padding > 0)
    embedded.push_back(at::zeros({padding, config.width}, options.dtype(at::kFloat)));
  p.x = at::cat(embedded);
  embedded.clear();
  num_rows += padding;
  const int64_t inner = config.num_heads * config.head_size;
  for (Tensor* rows : {&p.q, &p.k, &p.v}) *rows = at::empty({num_rows, inner}, options);
  p.y = at::zeros({num_rows, inner}, options);  // nothing attends for the padding
  for (Tensor* rows : {&p.n, &p.out}) *rows = at::empty({p.tile_rows, config.width}, options);
  for (Tensor* rows : {&p.gate, &p.up}) *rows = at::empty({p.tile_rows, config.mlp}, options);
  for (const Layer& layer : layers) run_layer(layer, config, samples, p);

  Tensor result = at::zeros({batch, length, config.width},
                            at::TensorOptions().dtype(at::kFloat).device(device));
  for (int64_t i = 0; i < batch; ++i) {
    const Sample& sample = samples[static_cast<size_t>(i)];
    const Tensor y = rms_norm(p.x.narrow(0, sample.begin, sample.rows), final_norm, at::kFloat);
    Tensor row = result.select(0, i);
    if (sample.live.defined())
      row.index_copy_(0, sample.live, y);
    else
      row.copy_(y);
  }
  return result;
}

}  // namespace flux::t5
