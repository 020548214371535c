// common/tensor/weight_file.h - named tensors from and to safetensors files.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "common/core/file.h"
#include "common/tensor/fwd.h"

namespace flux {

/// Weights as stored: names and dtypes of the file, float8 kept as Float8_e4m3fn. The tensors are
/// read-only views of the mapped files, which they keep alive: reading costs address space, and
/// memory only when a tensor is touched.
struct WeightFile {
  std::filesystem::path path;     // what was asked for
  std::vector<FileStamp> stamps;  // of every file that holds them
  TensorMap tensors;
  std::map<std::string, std::string> metadata;
};

/// One safetensors file, a sharded set (index file or first shard), or a folder with one of them;
/// see formats/safetensors/reader.h. Throws InputError: what that reader refuses, and dtypes
/// LibTorch has no type for.
WeightFile read_weights(const std::filesystem::path& path);

/// Writes CPU tensors under a temporary name and renames. Tensors are made contiguous one at a
/// time. Throws ResourceError if the disk is full or the folder not writable.
void write_weights(const std::filesystem::path& path,
                   const TensorMap& tensors,
                   const std::map<std::string, std::string>& metadata);

}  // namespace flux
