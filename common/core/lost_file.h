// common/core/lost_file.h - a mapped file that cannot be read any more is an error with a name.
#pragma once
#include <string_view>

namespace flux {

/// From here on SIGBUS in a MappedFile (its disk fails, or somebody cuts it off) ends the process
/// with exit 5 and one message that names `program` and the file. run_tool() calls it.
void report_lost_mappings(std::string_view program);

}  // namespace flux
