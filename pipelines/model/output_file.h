// pipelines/model/output_file.h - large files that flux-model writes, and which of those that are
// there it may replace.
#pragma once
#include <filesystem>
#include <string>
#include <string_view>

namespace flux::model {

/// Warns if the file is there and the metadata have `key`, which says that a run like this one made
/// it. Throws UsageError if it is there and they have not: it took somebody a day to download,
/// maybe.
///   maker  for the message: "--geometry"
void require_replaceable(const std::filesystem::path& file,
                         const std::string& key,
                         std::string_view maker);

}  // namespace flux::model
