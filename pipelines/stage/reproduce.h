// pipelines/stage/reproduce.h - encodes a few samples of a finished cache again and says how far
// the results are from what is stored.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "formats/cache/reader.h"
#include "pipelines/stage/options.h"
#include "pipelines/stage/sink.h"

namespace flux::stage {

/// How far samples that were encoded again are from the stored ones. Relative is the L2 norm of the
/// difference over that of the stored tensor; of text the worse of T5 and CLIP.
struct Drift {
  int64_t num_samples = 0, num_equal = 0;  // equal: bit for bit
  int64_t num_failed = 0;                  // could not be encoded
  double max_absolute = 0, mean_absolute = 0;
  double max_relative = 0, bound = 0;  // of the relative drift
  std::string worst;                   // path or caption of the sample with max_relative

  bool within() const { return num_failed == 0 && max_relative <= bound; }
  std::string line() const;
  nlohmann::json json() const;
};

/// Compares what it is given with the cache.
class Reproduction : public Sink {
 public:
  /// Throws CacheError: the cache is not complete, of another recipe (naming the field), or another
  /// part than `shard` (which 0 of 1 leaves open).
  Reproduction(const std::filesystem::path& folder,
               const cache::Recipe& recipe,
               const cache::Shard& shard);

  /// Keys of `count` random samples of the cache that are among `wanted` (all, if they are fewer);
  /// sorted. Of a part's cache only those of that part are wanted.
  std::vector<Sha256Digest> choose(const std::vector<Sha256Digest>& wanted, int64_t count) const;

  void add(EncodedSample sample) override;
  void flush() override {}
  void stop_if_asked() override;
  /// Of all samples so far, and `failures` that could not be made.
  Drift drift(const std::vector<Failure>& failures) const;

 private:
  cache::Cache cache_;
  std::map<Sha256Digest, cache::IndexVariant> variants_;
  Drift drift_;
  double sum_absolute_ = 0;
  int64_t num_values_ = 0;
};

}  // namespace flux::stage
