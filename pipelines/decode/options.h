// pipelines/decode/options.h - what flux-decode is asked to do.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "common/image/encode.h"
#include "common/tensor/device.h"

namespace flux {
class Tool;
}

namespace flux::decode {

enum class Precision { kF32, kBF16 };

struct Options {
  /// Files of samples, folders with some of them (a run's samples), or a latents cache.
  std::vector<std::string> inputs;
  std::filesystem::path ae, out;  // out empty: beside each file of samples
  image::FileFormat format = image::FileFormat::kPng;
  std::optional<int64_t> quality;  // nothing: 95
  bool overwrite = false;          // pictures that are newer than their latents too
  int64_t limit = 0;               // pictures; 0: all
  std::filesystem::path sheet;
  int64_t columns = 0;  // 0: as many as a prompt has pictures, or about a square
  int64_t cell = 256;   // pixels of the longer side of a picture on the sheet

  DeviceChoice device = DeviceChoice::kAuto;
  Precision precision = Precision::kF32;
  int64_t memory = 0;             // bytes; 0: 80 % of what is free
  std::filesystem::path scratch;  // empty: the folder of the pictures
  std::string command_line;
};

void add_flags(Options& options, Tool& tool);
/// Rules between flags. Throws UsageError.
void check(const Options& options, const Tool& tool);
/// Of a file's name. Throws UsageError for another extension than png, jpg, jpeg and webp.
image::FileFormat format_of(const std::filesystem::path& file, const char* flag);

}  // namespace flux::decode
