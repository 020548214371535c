// formats/cache/lock.h - one writer a folder, any number of readers, and no lock that outlives its
// process.
#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/core/error.h"

namespace flux::cache {

/// A folder held open, so that its inode number stays what it is on every file system. A lock names
/// the number: in a copy of the folder, made while a process was at work in it, the lock says nothing.
class PinnedFolder {
 public:
  explicit PinnedFolder(const std::filesystem::path& folder);
  ~PinnedFolder();
  PinnedFolder(const PinnedFolder&) = delete;
  PinnedFolder& operator=(const PinnedFolder&) = delete;

  /// Empty: the folder cannot be opened.
  std::string inode() const;

 private:
  int fd_;
};

/// The file `.writer.lock`: who holds it (host, boot, process, its start time) and in which folder.
/// Made with link(), which works on network file systems where flock may hang. A lock whose process
/// on this host has ended, or that came along with a copy of the folder on this host, is taken over;
/// one of another host or another process namespace cannot be judged and is respected, unless it is of this very Slurm
/// job before it was queued again.
class WriterLock {
 public:
  enum class Needed {
    kAlways,
    /// In a folder in which nothing can be made, and so nobody writes, there is no lock: see held().
    kToWrite
  };

  /// Throws CacheError naming the owner if there is a living one; ResourceError if the file cannot
  /// be made.
  explicit WriterLock(const std::filesystem::path& folder, Needed needed = Needed::kAlways);
  ~WriterLock();
  WriterLock(const WriterLock&) = delete;
  WriterLock& operator=(const WriterLock&) = delete;

  bool held() const { return !refusal_; }
  /// Throws the ResourceError that says why there is no lock, if there is none.
  void require_held() const;

 private:
  PinnedFolder folder_;
  std::filesystem::path path_;
  std::string owner_;  // what is in the file
  std::optional<ResourceError> refusal_;
};

/// The file `.reader-<16 hex digits>.lock`, with the same content: flux-cache gc removes nothing
/// while its process lives. Take it before the manifest is read, and hold it as long as segments are.
class ReaderLock {
 public:
  /// Never fails: a folder that cannot be written is read without a lock, see held().
  explicit ReaderLock(const std::filesystem::path& folder);
  ~ReaderLock();
  ReaderLock(const ReaderLock&) = delete;
  ReaderLock& operator=(const ReaderLock&) = delete;

  bool held() const { return !owner_.empty(); }

 private:
  PinnedFolder folder_;
  std::filesystem::path path_;
  std::string owner_;  // what is in the file; empty: there is none
};

bool is_reader_lock_name(std::string_view name);
/// Throws CacheError naming the owner of the first reader's lock whose process lives or cannot be
/// judged (another host, another process namespace, an unreadable file). Returns the locks of dead
/// processes and those that came along with a copy, sorted.
std::vector<std::filesystem::path> require_no_readers(const std::filesystem::path& folder);

}  // namespace flux::cache
