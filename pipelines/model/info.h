// pipelines/model/info.h - flux-model info: which nets a weight file holds, in which layout, and
// their identity.
#pragma once
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/core/tool.h"

namespace flux::model {

struct InfoOptions {
  std::vector<std::string>
      files;  // one safetensors file, sharded index, first shard or folder each
  bool rehash = false;
};

void add_flags(InfoOptions& options, Tool& tool);
/// Throws UsageError if no file is given.
void check(const InfoOptions& options);

struct InfoReport {
  /// One object a net: file, kind, title, layout, prefix, quantization (if any), config, dtypes (name -> tensors),
  /// tensors, parameters, weights_sha256.
  nlohmann::json nets = nlohmann::json::array();
  /// The same for people.
  std::string text() const;
};

/// Throws InputError: a file that is not safetensors, holds no net of FLUX.1, or one of a kind that
/// is refused by name.
InfoReport info(const InfoOptions& options);

}  // namespace flux::model
