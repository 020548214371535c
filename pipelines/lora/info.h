// pipelines/lora/info.h - flux-lora info: what an adapter file adapts, of which ranks and how much.
#pragma once
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/core/tool.h"

namespace flux::lora_tools {

struct InfoOptions {
  std::vector<std::string> files;
};

void add_flags(InfoOptions& options, Tool& tool);
/// Throws UsageError if no file is given.
void check(const InfoOptions& options);

struct InfoReport {
  /// One object a file: file, layout, model (as far as the file tells), modules (path, kind, in, out, rank, alpha,
  /// scale, norm), ranks (rank -> modules), dtypes, parameters, norm, text_encoders, replaced, embeddings, metadata.
  nlohmann::json files = nlohmann::json::array();
  /// For people: layers that differ in the number of the block only are one line.
  std::string text() const;
};

/// Throws InputError: a file that is no LoRA of FLUX.
InfoReport info(const InfoOptions& options);

}  // namespace flux::lora_tools
