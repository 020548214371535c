// pipelines/stage/report.h - what an encoding run did: its summary line, its JSON object, its exit
// code.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/core/error.h"
#include "pipelines/stage/reproduce.h"

namespace flux::stage {

/// "1 image", "3 images"; `plural` is the plain one with an s.
std::string count_of(int64_t count, std::string_view plural);

/// Counts distinct samples (latents) or captions (text), but for `failed`, which counts items.
struct Report {
  std::string noun;     // "images", "captions"
  int64_t encoded = 0;  // by this run: new and changed ones
  int64_t kept = 0;     // there already
  int64_t changed = 0;  // of the encoded ones: their item was there with another sample
  nlohmann::json changed_by =
      nlohmann::json::object();  // field -> changed samples in which it differs
  std::vector<std::string>
      changed_fields;    // of parameters, weights, tokenizers, plan; "NAME: now X, before Y"
  int64_t unwanted = 0;  // in the folder, but wanted by no item: left to flux-cache gc
  int64_t failed = 0;
  int64_t predicted_bytes = 0;  // of the samples to encode, before it began
  double seconds = 0;
  std::optional<Drift> drift;  // of a run with --reproduce: the only thing it reports
  ExitCode exit_code = ExitCode::kOk;

  /// "encoded 24 images (2 of them changed), kept 3, unwanted 0, failed 0 in 3.2 s (7.5 images/s)"
  std::string line() const;
  /// encoded new changed changed_by changed_fields kept unwanted failed seconds samples_per_second
  /// peak_rss_bytes
  nlohmann::json json() const;
};

}  // namespace flux::stage
