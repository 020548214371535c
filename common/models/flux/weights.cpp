#include "common/models/flux/weights.h"

#include <fmt/format.h>

namespace flux::dit {
namespace {

using LinearVisitor = std::function<void(const std::string&, Linear&)>;
using TensorVisitor = std::function<void(const std::string&, at::Tensor&)>;

// One list of members serves both kinds of visit: `linear` and `tensor` get names and members in
// the order of a BFL file.
template <class OnLinear, class OnTensor>
void walk(DoubleBlock& block,
          const std::string& prefix,
          const OnLinear& linear,
          const OnTensor& tensor) {
  for (auto& [name, stream] :
       {std::pair<const char*, Stream&>{"img_", block.img}, {"txt_", block.txt}}) {
    linear(prefix + name + "mod.lin", stream.mod);
    linear(prefix + name + "attn.qkv", stream.qkv);
    tensor(prefix + name + "attn.norm.query_norm.scale", stream.query_scale);
    tensor(prefix + name + "attn.norm.key_norm.scale", stream.key_scale);
    linear(prefix + name + "attn.proj", stream.proj);
    linear(prefix + name + "mlp.0", stream.mlp_in);
    linear(prefix + name + "mlp.2", stream.mlp_out);
  }
}

template <class OnLinear, class OnTensor>
void walk(SingleBlock& block,
          const std::string& prefix,
          const OnLinear& linear,
          const OnTensor& tensor) {
  linear(prefix + "linear1", block.linear1);
  linear(prefix + "linear2", block.linear2);
  tensor(prefix + "norm.query_norm.scale", block.query_scale);
  tensor(prefix + "norm.key_norm.scale", block.key_scale);
  linear(prefix + "modulation.lin", block.modulation);
}

template <class OnLinear, class OnTensor>
void walk(Weights& weights, const OnLinear& linear, const OnTensor& tensor) {
  const auto embedder = [&](const std::string& name, Embedder& layers) {
    linear(name + ".in_layer", layers.in_layer);
    linear(name + ".out_layer", layers.out_layer);
  };
  linear("img_in", weights.img_in);
  embedder("time_in", weights.time_in);
  embedder("vector_in", weights.vector_in);
  if (weights.guidance_in) embedder("guidance_in", *weights.guidance_in);
  linear("txt_in", weights.txt_in);
  for (size_t i = 0; i < weights.double_blocks.size(); ++i)
    walk(weights.double_blocks[i], fmt::format("double_blocks.{}.", i), linear, tensor);
  for (size_t i = 0; i < weights.single_blocks.size(); ++i)
    walk(weights.single_blocks[i], fmt::format("single_blocks.{}.", i), linear, tensor);
  linear("final_layer.linear", weights.final_linear);
  linear("final_layer.adaLN_modulation.1", weights.final_modulation);
}

constexpr auto kIgnoreTensor = [](const std::string&, at::Tensor&) {};

auto both_tensors(const TensorVisitor& visit) {
  return [&visit](const std::string& path, Linear& layer) {
    visit(path + ".weight", layer.weight);
    visit(path + ".bias", layer.bias);
  };
}

}  // namespace

Weights empty_weights(const Config& config) {
  Weights weights;
  if (config.guidance) weights.guidance_in.emplace();
  weights.double_blocks.resize(static_cast<size_t>(config.num_double_blocks));
  weights.single_blocks.resize(static_cast<size_t>(config.num_single_blocks));
  return weights;
}

void for_each_linear(Weights& weights, const LinearVisitor& visit) {
  walk(weights, visit, kIgnoreTensor);
}
void for_each_linear(DoubleBlock& block, const std::string& prefix, const LinearVisitor& visit) {
  walk(block, prefix, visit, kIgnoreTensor);
}
void for_each_linear(SingleBlock& block, const std::string& prefix, const LinearVisitor& visit) {
  walk(block, prefix, visit, kIgnoreTensor);
}

void for_each_tensor(Weights& weights, const TensorVisitor& visit) {
  walk(weights, both_tensors(visit), visit);
}
void for_each_tensor(DoubleBlock& block, const std::string& prefix, const TensorVisitor& visit) {
  walk(block, prefix, both_tensors(visit), visit);
}
void for_each_tensor(SingleBlock& block, const std::string& prefix, const TensorVisitor& visit) {
  walk(block, prefix, both_tensors(visit), visit);
}

}  // namespace flux::dit
