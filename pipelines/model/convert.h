// pipelines/model/convert.h - flux-model convert: a FLUX transformer in another layout, dtype, number of files, or in
// 8 or 4 bits.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "common/core/dtype.h"
#include "common/core/tool.h"
#include "common/models/flux/layout.h"
#include "common/quant/format.h"

namespace flux::model {

struct ConvertOptions {
  std::filesystem::path in, out;
  std::optional<QuantFormat> quantize{};
  std::optional<dit::ModelLayout> layout{};  // nothing: as it is
  std::optional<DType> dtype{};              // nothing: as it is
  int64_t shard_bytes = 0;                   // 0: one file
};

void add_flags(ConvertOptions& options, Tool& tool);
/// Throws UsageError if a flag is missing or contradicts another.
void check(const ConvertOptions& options);

struct ConvertReport {
  std::filesystem::path file;  // or the index of several
  size_t files = 1;
  std::string layout;     // "bfl", "diffusers"
  std::string format;     // "fp8_e4m3_block64"; empty: not quantised
  int64_t quantized = 0;  // tensors
  int64_t tensors = 0;    // others
  int64_t bytes = 0;
  double seconds = 0;
  std::string line() const;
  nlohmann::json json() const;
};

/// Writes the net in `in` (any layout and dtype that training takes) in `layout`: the same bits, so that weights_sha256
/// stays, unless `dtype` or `quantize` asks for others. With `quantize` the matrices of the blocks are as
/// common/quant/quant.h says, the bits that training makes on the fly; all else is bfloat16. A quantised model
/// becomes a
/// plain one with `dtype`, and otherwise stays what it is. One tensor at a time is in memory. Files appear when they
/// are complete. A folder of the diffusers layout gets a config.json.
///
/// Throws InputError: what is refused as a model to train, a weight that is infinite or NaN, or is so in the new
/// dtype, a
/// quantised file that is to be quantised; UsageError: what is there and was not made here, or is `in`, a quantised
/// model in
/// the diffusers layout, which has none; ResourceError, before anything is written, if the disk has no room for it;
/// Interrupted after a signal, leaving nothing.
ConvertReport convert(const ConvertOptions& options);

}  // namespace flux::model
