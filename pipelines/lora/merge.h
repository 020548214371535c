// pipelines/lora/merge.h - flux-lora merge: LoRAs added to a transformer, or to one LoRA.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "common/core/dtype.h"
#include "common/core/tool.h"
#include "common/models/flux/layout.h"
#include "pipelines/lora/convert.h"
#include "pipelines/lora/options.h"

namespace flux::lora_tools {

struct MergeOptions {
  std::vector<std::string> files;  // FILE[:WEIGHT]
  OutputOptions output;            // layout: of a LoRA
  RankRule rank;                   // of a LoRA
  std::filesystem::path base;      // empty: into one LoRA
  std::optional<dit::ModelLayout> model_layout;
  int64_t shard_bytes = 0;
};

void add_flags(MergeOptions& options, Tool& tool);
/// Throws UsageError: no file, flags of the other kind of output.
void check(const MergeOptions& options, const Tool& tool);

struct ModelReport {
  std::filesystem::path file;
  size_t files = 1;
  int64_t changed = 0, tensors = 0, bytes = 0;
  double seconds = 0;
  uint64_t peak_rss_bytes = 0;
  std::string line() const;
  nlohmann::json json() const;
};

/// W + the sum of weight * (W' - W), where W' is what a LoRA alone makes of W: computed in float32 and rounded once
/// to the
/// dtype of W or --dtype. Tensors without an adapter keep their bits. One tensor of the model is in memory at a time,
/// and of
/// the LoRAs what belongs to it. Throws InputError: a LoRA that does not fit the model, a quantised model, results
/// that are infinite or NaN.
ModelReport merge_into_base(const MergeOptions& options);

/// One LoRA that adds what all add, by weight: downs and ups side by side, exact; where --rank or a threshold asks
/// for less,
/// the largest singular values of each module. Throws InputError for DoRA, which cannot be added, unless there is one
/// file with the weight 1.
WriteReport merge_into_lora(const MergeOptions& options);

}  // namespace flux::lora_tools
