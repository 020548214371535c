// pipelines/latents/read.h - picture files as bytes, and reasons on one line.
#pragma once
#include <filesystem>
#include <string>
#include <string_view>

#include "common/core/file.h"

namespace flux::latents {

/// Larger files are no photographs; they would fill the memory of several threads.
inline constexpr uint64_t kMaxPictureBytes = uint64_t{1} << 30;

inline std::string read_picture(const std::filesystem::path& file) {
  return read_file(file, kMaxPictureBytes);
}

/// The first line of a message, without its hint.
inline std::string one_line(std::string_view message) {
  return std::string(message.substr(0, message.find('\n')));
}

}  // namespace flux::latents
