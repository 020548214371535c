// formats/cache/lock.h - one writer a folder, and no lock left behind by a dead one.
#pragma once
#include <filesystem>
#include <string>

namespace flux::cache {

/// The file `.writer.lock`: who holds it (host, boot, process, its start time). Made with link(),
/// which works on network file systems where flock may hang. A lock whose process on this host has
/// ended is taken over; one of another host or another process namespace cannot be judged and is
/// respected.
class WriterLock {
 public:
  /// Throws CacheError naming the owner if there is a living one; ResourceError if the file cannot
  /// be made.
  explicit WriterLock(const std::filesystem::path& folder);
  ~WriterLock();
  WriterLock(const WriterLock&) = delete;
  WriterLock& operator=(const WriterLock&) = delete;

 private:
  std::filesystem::path path_;
  std::string owner_;  // what is in the file
};

}  // namespace flux::cache
