// pipelines/lora/convert.h - flux-lora convert: the same LoRA in another layout.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/core/tool.h"
#include "pipelines/lora/options.h"

namespace flux::lora_tools {

struct ConvertOptions {
  std::vector<std::string> files;  // one
  OutputOptions output;
};

void add_flags(ConvertOptions& options, Tool& tool);
/// Throws UsageError: not one file, no --out, no --to and no --dtype.
void check(const ConvertOptions& options);

/// What a verb that writes a LoRA says of it.
struct WriteReport {
  std::filesystem::path file;
  std::string layout;
  size_t modules = 0, tensors = 0;
  int64_t bytes = 0;
  double seconds = 0;
  /// Of verbs that leave something out: the largest relative error of a module.
  std::optional<double> error{};
  std::optional<std::pair<int64_t, int64_t>> ranks{};  // smallest and largest
  std::string line() const;
  nlohmann::json json() const;
};

/// Exact, as LayoutWriter is; one layer at a time is in memory. Throws InputError, as AdapterFile and LayoutWriter do.
WriteReport convert(const ConvertOptions& options);

}  // namespace flux::lora_tools
