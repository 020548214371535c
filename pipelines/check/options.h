// pipelines/check/options.h - the flags of flux-check.
#pragma once
#include <string>
#include <vector>

#include "common/core/tool.h"
#include "common/tensor/device.h"

namespace flux::check {

enum class Precision { kF32, kBF16 };

struct Options {
  std::vector<std::string> folders;
  Precision precision = Precision::kF32;
  DeviceChoice device = DeviceChoice::kAuto;
};

void add_flags(Options& options, Tool& tool);
/// Throws UsageError if no folder is given.
void check(const Options& options);

}  // namespace flux::check
