// common/models/lora/weighted_file.h - "FILE:WEIGHT" on a command line. No LibTorch.
#pragma once
#include <filesystem>
#include <string>

namespace flux::lora {

/// An adapter file, and how much of it.
struct WeightedFile {
  std::filesystem::path file;
  double weight = 1;
};

/// "FILE", or "FILE:WEIGHT" where what follows the last colon is a number and no file has the whole name. Throws UsageError
/// for a weight that is not finite.
WeightedFile weighted_file(const std::string& text);

}  // namespace flux::lora
