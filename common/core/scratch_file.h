// common/core/scratch_file.h - a file without a name: whatever happens to the process, nothing of it stays.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include "common/core/error.h"

namespace flux {

/// Bytes on a disk for the life of this object. Reads and writes of different ranges may run in several threads.
class ScratchFile {
 public:
  /// Makes the file in `folder` (made if absent), with O_TMPFILE or, where a file system has none, removed at once.
  ///   purpose  "block inputs", for messages
  /// Throws ResourceError if the folder cannot be written.
  ScratchFile(std::filesystem::path folder, std::string purpose);
  ~ScratchFile();
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;

  /// Takes the space of all bytes up to `size` from the disk now, so that a later write does not find it full. Throws
  /// ResourceError naming the folder, the bytes needed and those free, if there are not enough.
  void reserve(int64_t size);
  /// Throw ResourceError, naming folder and purpose.
  void read(int64_t offset, std::span<std::byte> to) const;
  void write(int64_t offset, std::span<const std::byte> from);

  int descriptor() const { return file_; }
  /// The descriptor for somebody else, who closes it; nothing can be done with this object any more.
  int release();

  /// A failure of the scratch file for `purpose` in `folder`: what it says and advises.
  static ResourceError failure(const std::filesystem::path& folder,
                               const std::string& purpose,
                               const std::string& what,
                               int error_number);

 private:
  [[noreturn]] void fail(const char* what, int error) const;
  std::filesystem::path folder_;
  std::string purpose_;
  int file_ = -1;
};

}  // namespace flux
