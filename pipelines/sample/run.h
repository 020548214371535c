// pipelines/sample/run.h - text cache and transformer to latents of pictures.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "common/core/error.h"
#include "pipelines/sample/options.h"

namespace flux::sample {

struct Report {
  std::filesystem::path out;
  int64_t pictures = 0, wanted = 0, prompts = 0, steps = 0;
  double seconds = 0, seconds_per_step = 0;  // of the process; of one picture's step
  uint64_t peak_rss_bytes = 0;
  ExitCode exit_code = ExitCode::kOk;

  std::string line() const;
  nlohmann::json object() const;
};

/// Samples --count pictures of every prompt into --out. After a signal the file has the finished ones, and the report its
/// exit code. Throws CacheError, InputError, UsageError, ResourceError.
Report run(const Options& options);
/// Prints the plan: exit code 0 if something fits, else 5.
ExitCode run_plan(const Options& options);

}  // namespace flux::sample
