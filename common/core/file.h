// common/core/file.h - whole files: read, map, and write so that a file under its final name is
// complete.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace flux {

/// Reads a regular file of at most `max_bytes`. Throws InputError: absent, not a regular file, too
/// large, unreadable.
std::string read_file(const std::filesystem::path& path, uint64_t max_bytes = UINT64_MAX);
/// Calls `take` with the file's bytes in order, 1 MiB at a time. Throws InputError.
void read_chunks(const std::filesystem::path& path,
                 const std::function<void(std::span<const std::byte>)>& take);

/// A file as the file system knows it: equal stamps mean equal bytes, for memoising hashes.
struct FileStamp {
  std::filesystem::path path;
  uint64_t device = 0, inode = 0, size_bytes = 0;
  int64_t modified_ns = 0, changed_ns = 0;  // since 1970
  bool operator==(const FileStamp&) const = default;
};
/// Throws InputError if the file is not there.
FileStamp file_stamp(const std::filesystem::path& path);

/// A regular file mapped read-only. The mapping stays valid when the file is renamed or removed; a
/// file that somebody truncates in place would raise SIGBUS, which is why everything here is
/// written by rename.
class MappedFile {
 public:
  /// Throws InputError: absent, not a regular file, unreadable.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::filesystem::path& path() const { return stamp_.path; }
  /// Of the file that is mapped, whatever has its name now.
  const FileStamp& stamp() const { return stamp_; }

 private:
  FileStamp stamp_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// Writes a file under a temporary name beside the final one; commit() flushes it to the disk,
/// renames it and flushes the folder. Without commit() the temporary file is removed. Every failure
/// is a ResourceError that names the path.
///
/// Several processes may write one: the one that makes it calls share(), the others open what that returned, write_at()
/// and leave() it, and then the first one commits.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  /// Opens the temporary file that another process made; it stays that process's.
  AtomicFile(std::filesystem::path path, std::filesystem::path temporary);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  /// Overwrites bytes already written, for headers that are known last.
  void write_at(uint64_t offset, std::span<const std::byte> bytes);
  void commit();
  /// Writes all so far to the disk, under the temporary name: what the disk refuses shows here.
  void flush();
  /// Makes it `size_bytes` long, with zeros, flushes it, and returns the temporary file. The length comes before other
  /// clients of NFS write: beyond the end that they know of they would write whole pages, over each other's bytes.
  std::filesystem::path share(uint64_t size_bytes);
  /// Flushes and closes a file that another process will commit: it sees all bytes then, also over NFS.
  void leave();
  /// From now on a failure leaves the temporary file: somebody else will finish the work.
  void keep() { keep_ = true; }
  /// As commit(), but a file that has the final name already is an error and stays as it is.
  void commit_new();
  uint64_t size_bytes() const { return size_; }

 private:
  [[noreturn]] void fail(const char* what) const;
  void publish(bool replace);
  std::filesystem::path path_, temporary_;
  int fd_ = -1;
  uint64_t size_ = 0;
  bool keep_ = false;
};

/// AtomicFile in one call.
void write_file_atomic(const std::filesystem::path& path, std::string_view bytes);
/// Does nothing if the file already holds exactly `bytes`, so that its modification time stays.
/// Returns whether it wrote.
bool write_file_if_changed(const std::filesystem::path& path, std::string_view bytes);

/// write() until all is written: short and interrupted writes go on. False: errno says why it is not.
bool write_all(int fd, std::span<const std::byte> bytes);
/// fsync() that goes on after an interruption. False: errno says why.
bool flush_to_disk(int fd);

/// Makes a folder and its parents. Throws ResourceError if that fails or something else has the
/// name.
void make_folder(const std::filesystem::path& path);
/// Flushes a folder's entries to the disk. Throws ResourceError.
void sync_folder(const std::filesystem::path& path);
/// What to do about a write that failed with `number` (an errno): the hint of a ResourceError.
std::string write_failure_hint(int number);
/// Where this user's programs remember what they need not work out again: flux-stages in
/// $XDG_CACHE_HOME or ~/.cache. Nothing if neither variable names a folder. It may not exist yet.
std::optional<std::filesystem::path> user_cache_folder();
/// 16 hex digits that no other process has (from the kernel's generator).
std::string random_name();
/// Largest resident size of this process so far, in bytes (VmHWM).
uint64_t peak_rss_bytes();
/// The same now.
uint64_t rss_bytes();

}  // namespace flux
