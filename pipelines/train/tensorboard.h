// pipelines/train/tensorboard.h - the event files that TensorBoard reads.
//
// A file is a row of records: length (u64), its checksum, the bytes, theirs; a record is a protobuf message
// tensorflow.Event. Source: tensorflow/core/lib/io/record_writer.cc, tensorflow/core/util/event.proto,
// tensorflow/core/framework/summary.proto.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "pipelines/train/append_file.h"

namespace flux::train {

/// CRC-32C of `bytes`, rotated by 15 bits and moved, as records carry it.
uint32_t masked_crc32c(std::string_view bytes);

class EventFile {
 public:
  /// Makes a new file in `folder` that comes after those there, and says in it that the run starts at `first_step`: TensorBoard
  /// then forgets what it read of that step and later ones. Throws ResourceError.
  EventFile(const std::filesystem::path& folder, int64_t first_step);

  /// One value of each curve.
  void add(int64_t step, const std::vector<std::pair<std::string, double>>& values);

 private:
  AppendFile file_;
};

}  // namespace flux::train
