// common/dataset/path_text.h - file names of any bytes as JSON text and back, without loss.
#pragma once
#include <string>
#include <string_view>

namespace flux::dataset {

/// UTF-8 text of a file name: a backslash becomes two, and a byte that is not part of well-formed
/// UTF-8 becomes \xNN (two lower-case hex digits). All else stays as it is, so ordinary names read
/// as they are.
std::string path_text(std::string_view path_bytes);
/// The inverse. Throws std::invalid_argument on a backslash that starts neither.
std::string path_bytes(std::string_view text);

}  // namespace flux::dataset
