// pipelines/stage/options.h - flags that flux-cache-latents and flux-cache-text have in common.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/core/dtype.h"
#include "common/core/tool.h"
#include "common/dataset/dataset.h"
#include "common/dataset/profile.h"
#include "common/tensor/device.h"
#include "formats/cache/manifest.h"

namespace flux::stage {

/// Which images and captions: exactly one of the two paths.
struct DatasetOptions {
  std::filesystem::path dataset;  // sd-scripts' TOML
  std::filesystem::path images;   // a folder with its defaults
  Profile profile = Profile::kDefault;
};
/// --dataset, --images, --profile.
void add_flags(DatasetOptions& options, Tool& tool);
/// Throws UsageError unless exactly one of the paths is given. A tool with one more way to say what
/// to read names its flag
/// ("prompts") and gives its value.
void check(const DatasetOptions& options,
           std::string_view other_flag = {},
           const std::filesystem::path& other = {});
/// Reads the file or the folder, and refuses what a cache cannot honour. `width` and `height`:
/// --resolution, 0 = not given. Throws InputError; UsageError if --resolution has no effect because
/// the file says it everywhere.
dataset::Resolved resolve(const DatasetOptions& options, int64_t width, int64_t height);
/// The same for a stage that reads captions only: a file that leaves the resolution to --resolution
/// is fine.
dataset::Resolved resolve_captions(const DatasetOptions& options);

enum class Precision { kF32, kBF16 };
std::string_view precision_word(Precision precision);  // "f32", "bf16"

/// How to encode and where to.
struct EncodeOptions {
  std::filesystem::path out;
  DType dtype = DType::kBF16;  // of the stored tensors: kBF16, kF16 or kF32
  std::optional<Precision>
      precision;  // of the computation; not given = the folder's, or else the tool's default
  DeviceChoice device = DeviceChoice::kAuto;
  int64_t batch_size = 1;
  int64_t max_failed = 0;
  int64_t max_bytes = 0;  // of the folder's cache files; 0 = no limit
  cache::Shard shard;     // 0 of 1 = everything
  int64_t reproduce = 0;  // samples to encode again and compare, instead of filling the cache
  bool rehash = false;
};
/// --out, --dtype, --precision (with `auto` if asked for), --device, --batch-size, --max-failed,
/// --max-bytes, --shard, --reproduce, --rehash.
void add_flags(EncodeOptions& options, Tool& tool, bool precision_auto);
/// Throws UsageError: --out is missing, or a flag has no effect beside --reproduce.
void check(const EncodeOptions& options);
/// "3/8" -> {3, 8}. Throws UsageError unless 0 <= i < n <= 65536.
cache::Shard parse_shard(const std::string& text);
/// What was asked for, else what the folder has: of its manifest, or of what an interrupted run
/// left; else `otherwise`.
Precision choose_precision(const EncodeOptions& options, Precision otherwise);

}  // namespace flux::stage
