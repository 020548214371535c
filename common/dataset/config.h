// common/dataset/config.h - the dataset file itself, without its images; for this folder only.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string_view>
#include <vector>

#include "common/dataset/dataset.h"

namespace flux::dataset {

/// Fills `datasets` and `subsets` from a dataset file. Throws InputError as resolve_file() does.
Resolved read_config(const std::filesystem::path& toml,
                     Profile profile,
                     const std::vector<Fallback>& fallbacks,
                     const std::filesystem::path& base,
                     bool pixels);

/// JSON of a file, or of one line of it: `line` is the number of the text's first line. Throws
/// InputError naming file, line and what is wrong.
nlohmann::json parse_json(std::string_view text,
                          const std::filesystem::path& file,
                          int64_t line = 1);

}  // namespace flux::dataset
