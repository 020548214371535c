#include "common/core/disk.h"

#include <fmt/format.h>

#include <system_error>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux {
namespace fs = std::filesystem;

void require_free_space(const fs::path& path, uint64_t bytes) {
  std::error_code error;
  fs::path folder = fs::absolute(path, error);
  while (!fs::is_directory(folder, error) && folder.has_relative_path())
    folder = folder.parent_path();
  const fs::space_info space = fs::space(folder, error);
  if (error || space.available >= bytes) return;
  throw ResourceError(fmt::format("{}: {} bytes are needed ({}), {} bytes are free there ({})",
                                  show(path),
                                  bytes,
                                  show_bytes(bytes),
                                  space.available,
                                  show_bytes(space.available)),
                      "free space, or write to another disk");
}

}  // namespace flux
