// pipelines/decode/run.h - latents to pictures, contact sheet and the pictures of a run's report.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "common/core/error.h"
#include "pipelines/decode/options.h"

namespace flux::decode {

struct Report {
  int64_t decoded = 0, kept = 0;  // kept: there already, newer than their latents
  int64_t scratch_bytes = 0;      // of the picture that needed most
  std::filesystem::path out, sheet;
  double seconds = 0;
  uint64_t peak_rss_bytes = 0;
  ExitCode exit_code = ExitCode::kOk;

  std::string line() const;
  nlohmann::json object() const;
};

/// After a signal finished pictures stay, and the report has its exit code. Throws InputError, CacheError, UsageError;
/// ResourceError if a picture does not fit --memory, before any is decoded.
Report run(const Options& options);

}  // namespace flux::decode
