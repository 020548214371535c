// common/dataset/config.h - the dataset file itself, without its images; for this folder only.
#pragma once
#include <filesystem>
#include <vector>

#include "common/dataset/dataset.h"

namespace flux::dataset {

/// Fills `datasets` and `subsets` from a dataset file. Throws InputError as resolve_file() does.
Resolved read_config(const std::filesystem::path& toml,
                     Profile profile,
                     const std::vector<Fallback>& fallbacks,
                     const std::filesystem::path& base,
                     bool pixels);

}  // namespace flux::dataset
