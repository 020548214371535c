#include "pipelines/model/output_file.h"

#include <fmt/format.h>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "formats/safetensors/reader.h"

namespace flux::model {
namespace fs = std::filesystem;

void require_replaceable(const fs::path& file, const std::string& key, std::string_view maker) {
  std::error_code error;
  if (!fs::exists(fs::symlink_status(file, error))) return;
  bool ours = false;
  if (fs::is_directory(file, error)) throw UsageError(show(file) + ": is a folder, name a file");
  try {
    ours = safetensors::File::open(file)->metadata().contains(key);
  } catch (const InputError&) {
    // something else has the name
  }
  if (!ours)
    throw UsageError(fmt::format("{}: is there, and no weights that {} made", show(file), maker),
                     "write into another folder, or move the file away");
  log::warn("{}: is replaced", show(file));
}

}  // namespace flux::model
