// pipelines/latents/memo.h - hashes and sizes of pictures that were read before, so that a run with
// nothing to do reads none.
#pragma once
#include <filesystem>
#include <map>
#include <optional>

#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/image/image.h"

namespace flux::latents {

/// What is known of one picture file.
struct Picture {
  Sha256Digest sha256{};
  image::Header header;
};

/// One file a folder of pictures, in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, then
/// flux-stages). Pictures are known by device, inode, size and times, so that a moved or renamed
/// folder is known again. A cache folder that cannot be read or written is no error: everything is
/// read again then. Not thread-safe.
class Memo {
 public:
  /// Of the pictures in `folder`, which exists. `forget`: starts empty.
  Memo(const std::filesystem::path& folder, bool forget);

  std::optional<Picture> find(const FileStamp& stamp) const;
  /// Remembers, unless the file changed within the last second and so might change again unseen.
  void add(const FileStamp& stamp, const Picture& picture);
  /// Writes what find() and add() saw since the beginning, if that is not what is on disk.
  void save() const;

 private:
  struct Entry {
    FileStamp stamp;
    Picture picture;
    mutable bool used = false;
  };
  std::filesystem::path path_;                              // empty: nowhere to remember
  std::map<std::pair<uint64_t, uint64_t>, Entry> entries_;  // by device and inode
  bool changed_ = false;
};

}  // namespace flux::latents
