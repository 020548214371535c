// pipelines/train/plan.h - what a run will take of the machine, said before it starts.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "common/core/error.h"
#include "common/engine/plan.h"
#include "pipelines/train/options.h"

namespace flux::train {

/// The fastest setting that fits the budgets, or the smallest there is.
struct Choice {
  engine::Residency residency;
  engine::MemoryPlan plan;
  int64_t fixed =
      0;  // bytes that the process has without a model: libraries, threads, code of kernels
  int64_t needed = 0;  // of the budget that binds
  int64_t budget = 0;
  std::string budget_name;  // "--host-memory"
  std::string hint;         // if it does not fit
  bool fits = false;

  /// "weights 1.2 GiB, ... = 3.4 GiB of 8.0 GiB; 12 of 57 blocks in memory"
  std::string describe() const;
};

/// Throws ResourceError for a choice that does not fit: what is needed, and of what budget.
void require_fit(const Options& options, const Choice& choice);

/// Chooses what the user left open.
Choice choose(const Options& options,
              const dit::Config& config,
              const engine::ModelFile* file,
              const engine::TrainerOptions& wanted,
              const engine::StepShape& shape);

}  // namespace flux::train
