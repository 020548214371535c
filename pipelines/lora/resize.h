// pipelines/lora/resize.h - flux-lora resize: fewer ranks, by singular values.
#pragma once
#include <string>
#include <vector>

#include "common/core/tool.h"
#include "pipelines/lora/convert.h"
#include "pipelines/lora/options.h"

namespace flux::lora_tools {

struct ResizeOptions {
  std::vector<std::string> files;  // one
  RankRule rank;
  OutputOptions output;
};

void add_flags(ResizeOptions& options, Tool& tool);
/// Throws UsageError: not one file, no --out, no rank and no threshold.
void check(const ResizeOptions& options);

/// Each module becomes the nearest of its new rank, with the scale 1; one that has no more ranks keeps its bits. LoKr
/// becomes a pair where it is reduced. Throws InputError, as convert() does.
WriteReport resize(const ResizeOptions& options);

}  // namespace flux::lora_tools
