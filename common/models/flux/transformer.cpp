#include "common/models/flux/transformer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/silu.h>
#include <fmt/format.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "common/ops/attention.h"
#include "common/ops/gelu.h"
#include "common/ops/modulate.h"
#include "common/ops/qk_norm_rope.h"
#include "common/tensor/tensor.h"

namespace flux::dit {
namespace {

void show(const Tap& tap, std::string_view name, const at::Tensor& value) {
  if (tap) tap(name, value);
}

at::Tensor embed(const Embedder& layers, const at::Tensor& x) {
  return linear(layers.out_layer, at::silu(linear(layers.in_layer, x)));
}

at::Tensor mlp(const Stream& weights, const at::Tensor& x) {
  return linear(weights.mlp_out, gelu_tanh(linear(weights.mlp_in, x)));
}

/// What the modulations of a block read, [B, H]. Once a block, so that the block gives one float32 gradient
/// to vec and the sum over blocks is the same however they are visited.
at::Tensor activated(const at::Tensor& vec, const at::Tensor& x) {
  return at::silu(vec.to(x.scalar_type()));
}

/// `count` vectors [B, 1, H] from activated().
std::vector<at::Tensor> modulation(const Linear& layer, const at::Tensor& active, int64_t count) {
  return linear(layer, active).unsqueeze(1).chunk(count, -1);
}

Rope narrow(const Rope& rope, int64_t first, int64_t count) {
  return {rope.cos.narrow(1, first, count), rope.sin.narrow(1, first, count)};
}

}  // namespace

void check(const Config& config, const Inputs& in) {
  const int64_t batch = in.img.dim() == 3 ? in.img.size(0) : -1;
  const int64_t length = in.txt.dim() == 3 ? in.txt.size(1) : -1;
  check_shape("img", in.img, {-1, -1, config.in_channels});
  check_shape("txt", in.txt, {batch, -1, config.prompt_dim});
  check_shape("y", in.y, {batch, config.pooled_dim});
  check_shape("timestep", in.timestep, {batch});
  if (config.guidance) {
    if (!in.guidance.defined())
      throw std::invalid_argument("guidance is not given, and this transformer reads it");
    check_shape("guidance", in.guidance, {batch});
  }
  if (in.text_mask) check_shape("text_mask", *in.text_mask, {batch, length});
  for (const auto& [name, ids, count] :
       {std::tuple{"img_ids", in.img_ids, in.img.size(1)}, {"txt_ids", in.txt_ids, length}}) {
    if (ids.dim() == 3)
      check_shape(name, ids, {batch, count, 3});
    else
      check_shape(name, ids, {count, 3});
  }
}

at::Tensor sinusoid(const at::Tensor& values, int64_t dim) {
  const auto float_values = values.to(at::kFloat);
  const auto index = at::arange(dim / 2, float_values.options());
  const auto frequencies = (index * (-std::log(10000.0)) / static_cast<double>(dim / 2)).exp();
  const auto angles = (float_values * 1000).unsqueeze(1) * frequencies;
  return at::cat({angles.cos(), angles.sin()}, -1);
}

Rope rope_table(const Config& config, const at::Tensor& ids) {
  const auto positions = (ids.dim() == 2 ? ids.unsqueeze(0) : ids).to(at::kDouble);
  std::vector<at::Tensor> angles;
  for (size_t axis = 0; axis < config.axes.size(); ++axis) {
    const int64_t dim = config.axes[axis];
    const auto exponents =
        at::arange(dim / 2, positions.options()) * (-2.0 / static_cast<double>(dim));
    angles.push_back(positions.select(2, static_cast<int64_t>(axis)).unsqueeze(2) *
                     (exponents * std::log(config.theta)).exp());
  }
  const auto all = at::cat(angles, -1);
  return {all.cos().to(at::kFloat), all.sin().to(at::kFloat)};
}

at::Tensor condition(const Config& config,
                     const Weights& weights,
                     const Inputs& inputs,
                     const Tap& tap) {
  const auto type = weights.img_in.weight.scalar_type();
  const auto times = sinusoid(inputs.timestep, config.sinusoid_dim);
  show(tap, "sinusoid_timestep", times);
  auto vec = embed(weights.time_in, times.to(type));
  if (weights.guidance_in) {
    const auto guidances = sinusoid(inputs.guidance, config.sinusoid_dim);
    show(tap, "sinusoid_guidance", guidances);
    vec = vec + embed(*weights.guidance_in, guidances.to(type));
  }
  vec = vec + embed(weights.vector_in, inputs.y.to(type));
  show(tap, "vec", vec);
  return vec.to(at::kFloat);
}

Streams input_streams(const Weights& weights, const Inputs& inputs) {
  const auto type = weights.img_in.weight.scalar_type();
  return {linear(weights.img_in, inputs.img.to(type)), linear(weights.txt_in, inputs.txt.to(type))};
}

std::optional<at::Tensor> key_mask(const Inputs& inputs) {
  if (!inputs.text_mask) return std::nullopt;
  const auto text = inputs.text_mask->to(at::kBool);
  return at::cat({text, at::ones({inputs.img.size(0), inputs.img.size(1)}, text.options())}, 1);
}

Streams double_block(const DoubleBlock& weights,
                     const Streams& streams,
                     const at::Tensor& vec,
                     const Rope& rope,
                     const std::optional<at::Tensor>& mask) {
  const int64_t num_text = streams.txt.size(1), num_image = streams.img.size(1);
  const auto active = activated(vec, streams.img);
  const auto image_mod = modulation(weights.img.mod, active, 6),
             text_mod = modulation(weights.txt.mod, active, 6);
  const auto heads = [&](const Stream& stream,
                         const at::Tensor& x,
                         const std::vector<at::Tensor>& mod,
                         const Rope& angles) {
    const auto qkv = linear(stream.qkv, modulate(x, mod[0], mod[1]));
    return qk_norm_rope(qkv, stream.query_scale, stream.key_scale, angles.cos, angles.sin);
  };
  const auto text = heads(weights.txt, streams.txt, text_mod, narrow(rope, 0, num_text));
  const auto image = heads(weights.img, streams.img, image_mod, narrow(rope, num_text, num_image));
  const auto attended = attention(at::cat({text.q, image.q}, 1),
                                  at::cat({text.k, image.k}, 1),
                                  at::cat({text.v, image.v}, 1),
                                  mask);

  const auto rest = [&](const Stream& stream,
                        const at::Tensor& x,
                        const std::vector<at::Tensor>& mod,
                        const at::Tensor& part) {
    const auto y = gated_residual(x, mod[2], linear(stream.proj, part));
    return gated_residual(y, mod[5], mlp(stream, modulate(y, mod[3], mod[4])));
  };
  return {rest(weights.img, streams.img, image_mod, attended.narrow(1, num_text, num_image)),
          rest(weights.txt, streams.txt, text_mod, attended.narrow(1, 0, num_text))};
}

at::Tensor single_block(const SingleBlock& weights,
                        const at::Tensor& x,
                        const at::Tensor& vec,
                        const Rope& rope,
                        const std::optional<at::Tensor>& mask) {
  const auto mod = modulation(weights.modulation, activated(vec, x), 3);
  const auto both = linear(weights.linear1, modulate(x, mod[0], mod[1]));
  const int64_t qkv_size = 3 * x.size(-1);
  const auto parts = both.split_with_sizes({qkv_size, both.size(-1) - qkv_size}, -1);
  const auto heads =
      qk_norm_rope(parts[0], weights.query_scale, weights.key_scale, rope.cos, rope.sin);
  const auto attended = attention(heads.q, heads.k, heads.v, mask);
  return gated_residual(x, mod[2], linear(weights.linear2, concat_gelu(attended, parts[1])));
}

at::Tensor final_layer(const Weights& weights,
                       const at::Tensor& img,
                       const at::Tensor& vec,
                       const Tap& tap) {
  const auto mod = modulation(weights.final_modulation, activated(vec, img), 2);
  const auto modulated = modulate(img, mod[0], mod[1]);
  show(tap, "final_layer.modulated", modulated);
  return linear(weights.final_linear, modulated);
}

at::Tensor forward(const Config& config,
                   const Weights& weights,
                   const Inputs& inputs,
                   const Tap& tap) {
  check(config, inputs);
  const auto vec = condition(config, weights, inputs, tap);
  auto streams = input_streams(weights, inputs);
  show(tap, "img_in", streams.img);
  show(tap, "txt_in", streams.txt);
  const auto rope = rope_table(config, at::cat({inputs.txt_ids, inputs.img_ids}, -2));
  show(tap, "rope_cos", rope.cos);
  show(tap, "rope_sin", rope.sin);
  const auto mask = key_mask(inputs);

  for (size_t i = 0; i < weights.double_blocks.size(); ++i) {
    streams = double_block(weights.double_blocks[i], streams, vec, rope, mask);
    show(tap, fmt::format("double_blocks.{}.img", i), streams.img);
    show(tap, fmt::format("double_blocks.{}.txt", i), streams.txt);
  }
  auto x = at::cat({streams.txt, streams.img}, 1);
  for (size_t i = 0; i < weights.single_blocks.size(); ++i) {
    x = single_block(weights.single_blocks[i], x, vec, rope, mask);
    show(tap, fmt::format("single_blocks.{}", i), x);
  }
  return final_layer(weights, x.narrow(1, inputs.txt.size(1), inputs.img.size(1)), vec, tap);
}

}  // namespace flux::dit
