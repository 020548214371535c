// pipelines/lora/extract.h - flux-lora extract: the difference of two models as a LoRA.
#pragma once
#include <filesystem>
#include <string>

#include "common/core/tool.h"
#include "pipelines/lora/convert.h"
#include "pipelines/lora/options.h"

namespace flux::lora_tools {

struct ExtractOptions {
  std::filesystem::path base, tuned;
  RankRule rank{.rank = 64};
  OutputOptions output{.dtype = OutDType::kBF16};
};

void add_flags(ExtractOptions& options, Tool& tool);
/// Throws UsageError for a flag that is missing.
void check(const ExtractOptions& options);

/// tuned - base of every Linear that differs, as the largest singular values of the difference. Two tensors of the
/// models
/// are in memory at a time. Biases and norms that differ are not in the LoRA, which is said in a warning. Throws
/// InputError: models of other shapes (naming both), quantised ones, models that do not differ.
WriteReport extract(const ExtractOptions& options);

}  // namespace flux::lora_tools
