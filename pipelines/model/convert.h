// pipelines/model/convert.h - flux-model convert: a FLUX transformer with its blocks in 8 or 4 bits.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "common/core/tool.h"
#include "common/quant/format.h"

namespace flux::model {

struct ConvertOptions {
  std::filesystem::path in, out;
  std::optional<QuantFormat> quantize;
};

void add_flags(ConvertOptions& options, Tool& tool);
/// Throws UsageError if a flag is missing.
void check(const ConvertOptions& options);

struct ConvertReport {
  std::filesystem::path file;
  std::string format;     // "fp8_e4m3_block64"
  int64_t quantized = 0;  // tensors
  int64_t tensors = 0;    // that stay bfloat16
  int64_t bytes = 0;
  double seconds = 0;
  std::string line() const;
  nlohmann::json json() const;
};

/// Writes the transformer in `in` (any layout and dtype that training takes) under BFL names: the
/// matrices of the blocks as common/quant/quant.h says, the bits that training makes on the fly; all
/// else in bfloat16. One matrix at a time is in memory. The file appears when it is complete.
///
/// Throws InputError: what is refused as a model to train, a weight that is infinite or NaN, a file
/// that is quantised already; UsageError: `out` is there and no quantised file, or is `in`;
/// ResourceError, before anything is written, if the disk has no room for it; Interrupted after a
/// signal, leaving nothing.
ConvertReport convert(const ConvertOptions& options);

}  // namespace flux::model
