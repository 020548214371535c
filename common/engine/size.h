// common/engine/size.h - the size of a picture in a flag.
#pragma once
#include <cstdint>
#include <string>
#include <utility>

namespace flux::engine {

/// "1024x768" as width and height, "512" as a square. Throws UsageError unless both are multiples of 16 up to 16384.
std::pair<int64_t, int64_t> picture_size(const std::string& text);

}  // namespace flux::engine
