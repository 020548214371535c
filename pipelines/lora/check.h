// pipelines/lora/check.h - flux-lora check: whether two LoRA files do the same.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "common/core/tool.h"

namespace flux::lora_tools {

struct CheckOptions {
  std::vector<std::string> files;  // two, FILE[:WEIGHT]
  std::filesystem::path base;      // for DoRA; empty: random weights
  double tolerance = 1e-6;
  int64_t seed = 0;
};

void add_flags(CheckOptions& options, Tool& tool);
/// Throws UsageError unless two files are given.
void check(const CheckOptions& options);

/// What both files do to the output of one layer for the same random input.
struct LayerDifference {
  std::string path;
  double effect = 0;      // l2 norm of what the first file adds, of the larger one if they differ
  double difference = 0;  // l2 norm of the difference
  std::string only{};     // "first" or "second": the other file does not have the layer
  double relative() const { return effect > 0 ? difference / effect : 0; }
};

struct CheckReport {
  std::vector<LayerDifference> layers;
  double tolerance = 0;
  /// l2 norm of all differences over that of all effects.
  double relative = 0;
  const LayerDifference* worst() const;
  /// Every layer, and all of them, within the tolerance.
  bool equal() const;
  std::string text() const;
  nlohmann::json json() const;
};

/// Applies both files to random inputs in float64: y = delta x + delta of the bias, for each layer of the transformer
/// and of
/// the text encoders that either adapts; replaced tensors and embeddings are compared as they are. DoRA scales the
/// rows of
/// the weights of `base`, or of random ones. Throws InputError for files that are no LoRAs, or are of other models.
CheckReport compare(const CheckOptions& options);

}  // namespace flux::lora_tools
