// pipelines/decode/sources.h - which latents there are to decode, and what is known of each.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "pipelines/decode/options.h"

namespace flux::decode {

/// One picture to make.
struct Source {
  std::filesystem::path file;     // that holds it; of a cache, its manifest
  std::filesystem::path folder;   // of the picture, without --out
  std::string name;               // of the picture, without extension
  int64_t height = 0, width = 0;  // of the latents
  uint64_t prompt_number = 0;
  std::string prompt;
  std::string parameters;           // for people: prompt, then a line of settings
  std::string json;                 // the same and all else for programs
  std::optional<int64_t> step;      // of a training
  std::function<at::Tensor()> raw;  // [1, 16, h, w] float32; throws CacheError for damage
};

/// A folder whose files of samples a training made: its pictures go into the run's report.
struct Sources {
  std::vector<Source> all;
  bool of_cache = false;
  std::vector<std::filesystem::path> run_folders;  // of inputs RUN and RUN/samples
};

/// Throws CacheError for files of another kind or with damage; InputError for what is not there.
Sources find_sources(const Options& options);

}  // namespace flux::decode
