// pipelines/sample/options.h - what flux-sample is asked to do.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "common/engine/choices.h"
#include "common/tensor/device.h"

namespace flux {
class Tool;
}

namespace flux::sample {

/// The noise levels: shifted with the picture's size, as dev was trained, or evenly spaced.
enum class Schedule { kDev, kSchnell };
enum class Precision { kAuto, kF32, kBF16 };
enum class BasePrecision { kAsComputed, kFp8, kNf4 };
enum class PlanOutput { kNone, kTable, kJson };

struct Options {
  std::filesystem::path text, model, out;
  std::vector<std::string> lora;  // see lora::weighted_file()

  std::optional<Schedule> schedule;  // nothing: the model's, dev for one with a guidance input
  std::optional<int64_t> steps;      // nothing: 28, or 4 with kSchnell
  std::optional<double> guidance;    // nothing: 3.5, and not read by a model without guidance
  double cfg_scale = 1;
  std::optional<std::string> negative_prompt;  // a text of the cache, or its number
  int64_t seed = 0;
  int64_t width = 1024, height = 1024;
  int64_t count = 1;       // pictures of a prompt
  int64_t batch_size = 1;  // pictures that go through the model together

  DeviceChoice device = DeviceChoice::kAuto;
  Precision precision = Precision::kAuto;
  BasePrecision base = BasePrecision::kAsComputed;
  int64_t device_memory = 0, host_memory = 0;  // bytes; 0: 90 % and 80 % of what is free
  std::optional<int64_t> resident_blocks, ring_slots;
  std::optional<engine::StreamFrom> stream_from;
  PlanOutput plan = PlanOutput::kNone;
  bool rehash = false;
  std::string command_line;
};

void add_flags(Options& options, Tool& tool);
/// Rules between flags. Throws UsageError.
void check(const Options& options);

}  // namespace flux::sample
