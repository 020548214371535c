// pipelines/cache/diff.h - flux-cache diff: in what two caches differ.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "common/core/tool.h"
#include "pipelines/cache/contents.h"

namespace flux::cache {

struct DiffOptions {
  std::vector<std::string> folders;  // exactly two
};

void add_flags(DiffOptions& options, Tool& tool);
/// Throws UsageError unless two folders are given.
void check(const DiffOptions& options);

/// Things of one sort that differ.
struct Differing {
  struct Example {
    std::string id;    // key of a sample, item digest; 64 hex digits
    std::string name;  // path or caption; any bytes
  };
  int64_t count = 0;
  std::vector<Example> examples;  // the first five
};

/// Samples and items are told apart by their keys, so that it does not matter which segment holds
/// them. Who made a cache, when and where is never compared.
struct Difference {
  std::filesystem::path a, b;       // the folders
  std::vector<std::string> fields;  // "parameters.dtype: cache/a: "bf16", cache/b: "f32""
  int64_t num_samples_equal = 0;
  Differing samples_only_a, samples_only_b, samples_changed;
  /// Of the decoded values of changed samples, where both are finite; and of how many values one
  /// is not finite, and the other has other bits.
  double max_abs_difference = 0;
  int64_t num_not_finite = 0;
  int64_t num_items_equal = 0;
  Differing items_only_a, items_only_b, items_changed;  // changed: samples, weights, repeats, flags

  bool equal() const;
};
/// Throws CacheError where one of the two cannot be read.
Difference diff(const Contents& a, const Contents& b);

nlohmann::json diff_json(const Difference& difference);
/// The same for people; safe to print.
std::string diff_text(const Difference& difference);

}  // namespace flux::cache
