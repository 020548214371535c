// pipelines/train/metrics.h - what a step was: the numbers that the log, metrics.jsonl, TensorBoard
// and the report show alike.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "pipelines/train/append_file.h"
#include "pipelines/train/load.h"

namespace flux::train {

struct StepMetrics {
  int64_t step = 0, epoch = 0;  // from 1
  double loss = 0;              // mean over the samples
  double loss_smoothed = 0;     // see SmoothedLoss
  double learning_rate = 0;
  std::map<std::string, double> learning_rates{};  // of groups, see group_learning_rates()
  std::optional<double> grad_norm{};               // before clipping, where it is computed
  int64_t samples = 0;
  double seconds = 0;                          // of the step
  double data_wait_seconds = 0;                // of them, waiting for the reader
  int64_t memory_peak_bytes = 0;               // of tensors on the device, in this process so far
  std::vector<double> sigma{}, sample_loss{};  // of each sample
  std::optional<Validation> validation{};      // after the step, where there was one

  double images_per_second() const;
  double data_wait_share() const;
  /// A line of metrics.jsonl. The fields are called as they are here, with images_per_second and
  /// data_wait_share; grad_norm may be null; validation is there where there was one.
  nlohmann::json line() const;
  /// Of a line that line() gave. Nothing if it is not one.
  static std::optional<StepMetrics> from_line(const nlohmann::json& line);
  /// The numbers of a step that make curves, by name; without what was not computed.
  std::vector<std::pair<std::string, double>> curves() const;
};

/// Mean of the losses so far in which each weighs 0.98 of the next.
class SmoothedLoss {
 public:
  double add(double loss);

 private:
  double sum_ = 0, weight_ = 0;
};

/// metrics.jsonl of a run folder: one object a step.
class Metrics {
 public:
  /// Keeps the lines up to `last_step` (0: none) of what is there, drops later ones: what they were
  /// about was not saved. Throws ResourceError.
  Metrics(const std::filesystem::path& file, int64_t last_step);

  /// Sets loss_smoothed, over the steps before a resume too, and adds the line.
  void write(StepMetrics& step);
  /// Puts the lines on the disk: what a checkpoint is about is never lost when it stays.
  void flush() { file_.flush(); }

 private:
  SmoothedLoss smoothed_;
  AppendFile file_;
};

/// The most that tensors and arenas held on the device so far; and that the plan says they will.
int64_t device_peak_bytes(const c10::Device& device);
int64_t planned_peak_bytes(const Session& session);

}  // namespace flux::train
