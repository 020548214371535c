// pipelines/cache/stats.h - flux-cache stats: what the values of a cache look like, and how fast
// they are read.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "common/core/tool.h"
#include "pipelines/cache/contents.h"

namespace flux::cache {

struct StatsOptions {
  std::vector<std::string> folders;  // exactly one
};

void add_flags(StatsOptions& options, Tool& tool);
/// Throws UsageError unless one folder is given.
void check(const StatsOptions& options);

/// Of many values, in float64; NaN and infinite ones are counted and left out of the rest.
struct Moments {
  int64_t count = 0, num_nan = 0, num_inf = 0;  // count: of the finite ones
  double mean = 0;
  double squares = 0;       // sum of squared distances to the mean
  double min = 0, max = 0;  // 0 of nothing

  /// Of the population: divided by count.
  double deviation() const;
  /// As if the values of both had been seen. Source: Chan, Golub, LeVeque 1979, formula (2.1).
  void merge(const Moments& other);
};

/// A tensor of all samples: "mean" and "logvar" or "latents" (16 channels each), "mask" (1);
/// "t5_live" (rows of tokens), "t5_all" (all rows), "clip", a channel a column.
struct TensorStats {
  std::string name;
  std::vector<Moments> channels;
  Moments all() const;
};

/// Reading and decoding samples whose file is in memory.
struct Throughput {
  int threads = 0;
  double samples_per_s = 0, mb_per_s = 0;  // 10^6 decoded bytes
};

struct Stats {
  std::filesystem::path folder;
  Kind kind = Kind::kLatents;
  int64_t num_samples = 0;
  std::vector<TensorStats> tensors;
  std::vector<Throughput> throughput;  // with one thread, with all
};
/// Of the samples listed. Results do not depend on the number of threads. Throws CacheError where
/// one cannot be read, or samples are of different shapes; Interrupted.
Stats stats(const Contents& contents);

nlohmann::json stats_json(const Stats& stats);
/// The same for people, without channels of text; safe to print.
std::string stats_text(const Stats& stats);

}  // namespace flux::cache
