// pipelines/sample/plan.h - what sampling will take of the machine, and the fastest setting that fits.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>

#include "common/engine/plan.h"
#include "common/engine/sampler.h"
#include "pipelines/sample/options.h"

namespace flux::sample {

/// The setting with the most blocks in memory that fits the budgets, or the smallest there is.
struct Choice {
  engine::SamplerOptions sampler;
  engine::MemoryPlan plan;
  int64_t fixed = 0;   // bytes that the process has without a model
  int64_t needed = 0;  // of the budget that binds
  int64_t budget = 0;
  std::string budget_name;  // "--host-memory"
  std::string hint;         // if it does not fit
  bool blocks_fit = false;  // the memory that blocks stay in holds what it shall
  bool fits = false;

  /// "3.4 GiB of 8.0 GiB (--host-memory), tensors 3.1 GiB; 12 of 57 blocks stay in memory"
  std::string describe(int64_t num_blocks) const;
  nlohmann::json object(int64_t num_blocks) const;
  std::string table(int64_t num_blocks) const;
};

/// Chooses what the user left open.
///   adapters  for their sizes; any device
Choice choose(const Options& options,
              const engine::ModelFile& file,
              const engine::SamplerOptions& wanted,
              std::span<const engine::WeightedAdapters> adapters,
              const engine::SampleShape& shape);

}  // namespace flux::sample
