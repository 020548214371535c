// pipelines/latents/options.h - the flags of flux-cache-latents.
#pragma once
#include <array>
#include <cstdint>
#include <filesystem>
#include <string>

#include "pipelines/stage/options.h"

namespace flux::latents {

/// An animation: its first frame, or no picture at all.
enum class Animated { kFirst, kRefuse };

/// What is stored of the posterior: mean and log-variance, or one sample drawn with `seed`.
enum class Store { kMeanLogvar, kSample };

struct Options {
  stage::DatasetOptions data;
  stage::EncodeOptions encode;
  std::filesystem::path ae;
  int64_t width = 0, height = 0;  // pixels; 0 = the dataset file's, or 1024x1024 with --images
  Animated animated = Animated::kFirst;
  Store store = Store::kMeanLogvar;
  int64_t seed = 0;
  std::array<uint8_t, 3> background{255, 255, 255};
  bool background_given = false;
  std::string command_line;
};

void add_flags(Options& options, Tool& tool);
/// Throws UsageError.
void check(const Options& options);

/// "512x768" or "512". Throws UsageError unless both sides are in [32, 8192].
std::pair<int64_t, int64_t> parse_resolution(const std::string& text);
/// "white", "black" or "#rrggbb". Throws UsageError.
std::array<uint8_t, 3> parse_background(const std::string& text);

}  // namespace flux::latents
