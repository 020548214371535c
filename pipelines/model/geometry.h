// pipelines/model/geometry.h - flux-model tiny --geometry: random weights in the sizes of the
// published models, for measuring.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "pipelines/model/random_scales.h"

namespace flux::model {

enum class Geometry { kDev, kSchnell, kT5Xxl };

/// Numbers of double and single blocks; of T5 the first is the number of layers.
struct Depth {
  int64_t first = 0, second = 0;
};

struct GeometryOptions {
  Geometry geometry{};
  std::optional<Depth> depth;  // as published if not given
  std::filesystem::path out;   // folder
  uint64_t seed = 0;
};

/// "dev", "schnell", "t5-xxl". Throws UsageError for another word.
Geometry parse_geometry(const std::string& word);
/// "19,38", or "24" for T5. Throws UsageError for what is no such number (1 to 999 each).
Depth parse_depth(const std::string& text, Geometry geometry);

struct GeometryReport {
  std::filesystem::path file;
  int64_t parameters = 0, bytes = 0;
  double seconds = 0;
  std::string line() const;
  nlohmann::json json() const;
};

/// Writes flux.safetensors, or for kT5Xxl t5.safetensors, below `out`: names, shapes and dtype
/// (BF16) of the published file, values from the seed, with deviations that keep signals finite
/// through the whole depth. Memory stays at a few MB: the file is made piece by piece. It appears
/// under its name when it is complete. Throws UsageError if a file that no such call made would be
/// replaced; ResourceError, before anything is written, if the disk has no room for it; Interrupted
/// after a signal, leaving nothing.
GeometryReport write_geometry(const GeometryOptions& options);

/// One net of random bfloat16 values, each tensor with a stream of its own by seed, `net` and name,
/// with progress on stderr. Returns the number of bytes of the file.
int64_t write_random_net(
    const std::filesystem::path& path,
    std::string_view net,
    uint64_t seed,
    const std::map<std::string, std::vector<int64_t>>& shapes,
    const std::function<Scale(std::string_view, const std::vector<int64_t>&)>& scale_of,
    const std::map<std::string, std::string>& metadata);

}  // namespace flux::model
