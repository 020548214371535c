#include "pipelines/model/random_scales.h"

#include <cmath>

namespace flux::model {
namespace {

/// Keeps the variance of a signal through a linear layer or convolution, times gain^2.
Scale linear_scale(const std::vector<int64_t>& shape, double gain = 1) {
  int64_t fan_in = 1;
  for (size_t i = 1; i < shape.size(); ++i) fan_in *= shape[i];
  return {0, gain / std::sqrt(static_cast<double>(fan_in))};
}

bool contains(std::string_view name, std::string_view part) {
  return name.find(part) != std::string_view::npos;
}

}  // namespace

Scale flux_scale(std::string_view name, const std::vector<int64_t>& shape) {
  if (name.ends_with("_norm.scale")) return {1, 0.1};
  if (name.ends_with(".bias")) return {0, 0.05};
  // LoRAs do not reach the last layer: it must be able to put out a velocity (deviation about 1.4)
  // by itself
  return linear_scale(shape, name == "final_layer.linear.weight" ? 1.5 : 1.0);
}

Scale ae_scale(std::string_view name, const std::vector<int64_t>& shape) {
  if (contains(name, "norm")) return name.ends_with(".weight") ? Scale{1, 0.1} : Scale{0, 0.05};
  if (name.ends_with(".bias")) return {0, 0.05};
  // the activation before it has a root mean square of 0.6, raw latents about 2.8
  if (name == "encoder.conv_out.weight") return linear_scale(shape, 4.5);
  return linear_scale(shape);
}

Scale t5_scale(std::string_view name, const std::vector<int64_t>& shape) {
  if (contains(name, "layer_norm")) return {1, 0.1};
  if (name == "shared.weight" || contains(name, "relative_attention_bias")) return {0, 1};
  // scores are not divided by sqrt(head size)
  if (contains(name, "SelfAttention.q.") || contains(name, "SelfAttention.k."))
    return linear_scale(shape, 0.5);
  return linear_scale(shape);
}

Scale clip_scale(std::string_view name, const std::vector<int64_t>& shape) {
  if (contains(name, "norm")) return name.ends_with(".weight") ? Scale{1, 0.1} : Scale{0, 0.05};
  if (contains(name, "position_embedding")) return {0, 0.3};
  if (contains(name, "token_embedding")) return {0, 1};
  if (name.ends_with(".bias")) return {0, 0.05};
  return linear_scale(shape, 1.5);
}

}  // namespace flux::model
