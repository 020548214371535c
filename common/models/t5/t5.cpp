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

int64_t tile_rows_of(int64_t length, bool masked) { return masked ? kTileRows : length; }

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

void attend(const Batch::Sample& sample, const Config& config, const Scratch& s) {
  const auto heads = [&](const Tensor& rows) {
    return rows.narrow(0, sample.begin, sample.rows)
        .view({1, sample.rows, config.num_heads, config.head_size})
        .transpose(1, 2);  // [1, A, L, d]
  };
  // the bias depends on differences of positions only
  const Tensor bias = sample.live.defined()
                          ? s.bias.index_select(2, sample.live).index_select(3, sample.live)
                          : s.bias.narrow(2, 0, sample.rows).narrow(3, 0, sample.rows).contiguous();
  // T5 does not divide the scores by sqrt(d)
  heads(s.y).copy_(at::scaled_dot_product_attention(heads(s.q),
                                                    heads(s.k),
                                                    heads(s.v),
                                                    bias,
                                                    /*dropout_p=*/0.0,
                                                    /*is_causal=*/false,
                                                    /*scale=*/1.0));
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
  e.device = device;
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

Batch Encoder::begin(const Tensor& ids, const Tensor& mask) const {
  check_ids(ids, mask, config.vocabulary);
  const c10::InferenceMode no_grad;
  Batch batch;
  batch.length = ids.size(1);
  batch.masked = mask.defined();
  batch.tile_rows = tile_rows_of(batch.length, batch.masked);
  std::vector<Tensor> embedded;
  int64_t num_rows = 0;
  for (int64_t i = 0; i < ids.size(0); ++i) {
    Batch::Sample sample{.begin = num_rows, .rows = batch.length, .live = {}};
    Tensor tokens = ids.select(0, i).cpu();
    if (batch.masked) {
      const Tensor live = mask.select(0, i).cpu().nonzero().flatten();
      sample.rows = live.numel();
      if (sample.rows == 0)
        throw std::invalid_argument(fmt::format("mask: row {} masks out everything", i));
      tokens = tokens.index_select(0, live);
      if (live[-1].item<int64_t>() != sample.rows - 1) sample.live = live.to(device);
    }
    const Tensor rows = shared.index_select(0, tokens.to(shared.device()));
    embedded.push_back(to_dtype(rows, at::kFloat).to(device));
    num_rows += sample.rows;
    batch.samples.push_back(std::move(sample));
  }
  const int64_t padding = (batch.tile_rows - num_rows % batch.tile_rows) % batch.tile_rows;
  if (padding > 0)
    embedded.push_back(
        at::zeros({padding, config.width}, at::TensorOptions(at::kFloat).device(device)));
  batch.x = at::cat(embedded);
  return batch;
}

int64_t Encoder::scratch_bytes(int64_t rows, int64_t length, bool masked) const {
  const int64_t tile = tile_rows_of(length, masked), inner = config.num_heads * config.head_size;
  const int64_t values = 4 * rows * inner + 2 * tile * (config.width + config.mlp) +
                         config.num_heads * length * length * 2;  // the bias and a sample's copy
  return values * static_cast<int64_t>(c10::elementSize(dtype));
}

void Encoder::run_layer(const Layer& layer, Batch& batch, Scratch& s) const {
  const c10::InferenceMode no_grad;
  const int64_t num_rows = batch.x.size(0), inner = config.num_heads * config.head_size;
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  const auto room = [&](Tensor& tensor, int64_t rows, int64_t columns) {
    if (!tensor.defined() || tensor.size(0) < rows) {
      tensor.reset();
      tensor = at::empty({rows, columns}, options);
    }
  };
  for (Tensor* rows : {&s.q, &s.k, &s.v, &s.y}) room(*rows, num_rows, inner);
  for (Tensor* rows : {&s.n, &s.out}) room(*rows, batch.tile_rows, config.width);
  for (Tensor* rows : {&s.gate, &s.up}) room(*rows, batch.tile_rows, config.mlp);
  if (!s.bias.defined() || s.bias.size(2) != batch.length)
    s.bias = bias_of_length(position_bias, batch.length, dtype);

  const auto each_tile = [&](auto&& body) {
    for (int64_t row = 0; row < num_rows; row += batch.tile_rows)
      body([&, row](const Tensor& rows) { return rows.narrow(0, row, batch.tile_rows); });
  };
  const auto tile_of = [&](const Tensor& rows) { return rows.narrow(0, 0, batch.tile_rows); };
  Tensor n = tile_of(s.n), out = tile_of(s.out), gate = tile_of(s.gate), up = tile_of(s.up);
  const auto product = [](const Tensor& rows, const Tensor& weight, Tensor to) {
    at::mm_out(to, rows, weight.t());
  };
  each_tile([&](auto&& tile) {
    rms_norm_into(tile(batch.x), layer.norm1, n);
    product(n, layer.q, tile(s.q));
    product(n, layer.k, tile(s.k));
    product(n, layer.v, tile(s.v));
  });
  const auto& last = batch.samples.back();
  const int64_t used = last.begin + last.rows;
  if (used < num_rows) s.y.narrow(0, used, num_rows - used).zero_();  // nothing attends there
  for (const Batch::Sample& sample : batch.samples) attend(sample, config, s);
  each_tile([&](auto&& tile) {
    product(tile(s.y), layer.o, out);
    tile(batch.x).add_(out);
    rms_norm_into(tile(batch.x), layer.norm2, n);
    product(n, layer.wi_0, gate);
    at::gelu_(gate, "tanh");
    product(n, layer.wi_1, up);
    gate.mul_(up);
    product(gate, layer.wo, out);
    tile(batch.x).add_(out);
  });
}

Tensor Encoder::finish(const Batch& batch) const {
  const c10::InferenceMode no_grad;
  Tensor result = at::zeros({std::ssize(batch.samples), batch.length, config.width},
                            at::TensorOptions().dtype(at::kFloat).device(device));
  for (int64_t i = 0; i < result.size(0); ++i) {
    const Batch::Sample& sample = batch.samples[static_cast<size_t>(i)];
    const Tensor y = rms_norm(batch.x.narrow(0, sample.begin, sample.rows), final_norm, at::kFloat);
    Tensor row = result.select(0, i);
    if (sample.live.defined())
      row.index_copy_(0, sample.live, y);
    else
      row.narrow(0, 0, sample.rows).copy_(y);
  }
  return result;
}

Tensor Encoder::encode(const Tensor& ids, const Tensor& mask) const {
  Batch batch = begin(ids, mask);
  Scratch scratch;
  for (const Layer& layer : layers) run_layer(layer, batch, scratch);
  return finish(batch);
}

}  // namespace flux::t5
