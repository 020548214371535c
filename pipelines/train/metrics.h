// pipelines/train/metrics.h - metrics.jsonl: one JSON object a step.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>

namespace flux::train {

/// Fields of a line: step and epoch (from 1), loss, learning_rate, grad_norm (before clipping),
/// samples, seconds (of the step), data_wait_seconds (of it, waiting for the reader).
class Metrics {
 public:
  /// Keeps lines up to `last_step` (0: none) of what is there, drops later ones: they were not
  /// saved. Throws ResourceError.
  Metrics(const std::filesystem::path& file, int64_t last_step);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  /// Throws ResourceError if the disk is full.
  void write(const nlohmann::json& line);

 private:
  std::filesystem::path file_;
  int fd_;
};

}  // namespace flux::train
