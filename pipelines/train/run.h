// pipelines/train/run.h - the whole of flux-train: caches and model in, checkpoints and metrics
// out.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "common/core/error.h"
#include "pipelines/train/options.h"

namespace flux::train {

struct Report {
  ExitCode exit_code = ExitCode::kOk;           // kInterrupt and its kin after a signal
  int64_t steps = 0;                            // updates in all, those before a resume included
  std::optional<double> loss_first, loss_last;  // of this run; nothing if it had no step to make
  double seconds = 0;                           // since the process started
  std::optional<double> seconds_to_first_step;  // until the first loss was known
  uint64_t peak_rss_bytes = 0;
  std::optional<double> validation_loss;  // the last one of this run
  std::optional<int64_t> best_step;  // of the checkpoint that is marked, and its validation loss
  std::optional<double> best_loss;

  std::string line() const;
  nlohmann::json object() const;
};

/// Trains. Throws UsageError if --out holds checkpoints and neither --resume nor --replace is
/// given; CacheError if another run is at work there; what open_data(), load_model(), restore(), train_step() and save() throw. After a signal
/// the step in hand is finished and saved.
Report run(const Options& options);

/// --plan: prints what the run would take as a table, or as the object {"fits", "peak_bytes", "causes", ...}. kOk if it
/// fits, else kResource.
ExitCode run_plan(const Options& options);

}  // namespace flux::train
