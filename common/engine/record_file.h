// common/engine/record_file.h - reading and writing at positions of a file, through the page cache
// or past it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <span>
#include <string>

namespace flux::engine {

enum class FileAccess {
  kCached,   // through the page cache
  kDropped,  // through the page cache, which is told to forget what was read or written
  kDirect,   // past the page cache (O_DIRECT); kDropped where the file system does not offer it
  kAuto,     // see choose_access()
};
inline constexpr FileAccess kDefaultFileAccess = FileAccess::kAuto;
/// kAuto decided for files of `bytes` in all: kCached where they are at most half of `available`
/// memory, so that they stay in the page cache while a run goes on, else kDirect. Measured:
/// docs/benchmarks.md.
FileAccess choose_access(FileAccess access, int64_t bytes, int64_t available);
FileAccess choose_access(FileAccess access, int64_t bytes);
/// Bytes that programs may still take: the system's estimate, or what the control group's limit
/// leaves (its page cache counts as free), whichever is less.
int64_t available_memory_bytes();

/// An open file. All functions are for any thread.
class RecordFile {
 public:
  /// Makes the exception of a failure out of what happened: "cannot be read: Input/output error".
  using Failure = std::function<std::exception_ptr(const std::string& what, int error_number)>;

  /// Takes `fd` over. `access` is not kAuto.
  RecordFile(int fd, FileAccess access, Failure failure);
  ~RecordFile();
  RecordFile(const RecordFile&) = delete;
  RecordFile& operator=(const RecordFile&) = delete;

  int fd() const { return fd_; }
  FileAccess access() const { return access_; }

  /// Reads `to.size()` bytes at `offset`, a few MiB at a time. Past the page cache, what is not
  /// aligned goes over a buffer of kBounceBytes. The end of the file before the last byte is a
  /// failure (error number 0).
  void read(int64_t offset, std::span<std::byte> to) const;
  void write(int64_t offset, std::span<const std::byte> from) const;
  /// Asks the system to read the range ahead; nothing past the page cache.
  void prefetch(int64_t offset, int64_t bytes) const;

  static constexpr int64_t kBounceBytes = int64_t{4} << 20;
  /// Of the buffer, for plans.
  int64_t staging_bytes() const { return access_ == FileAccess::kDirect ? kBounceBytes : 0; }

 private:
  void read_plain(int fd, int64_t offset, std::span<std::byte> to) const;
  void write_plain(int fd, int64_t offset, std::span<const std::byte> from) const;
  void forget(int64_t offset, int64_t bytes) const;
  int fd_ = -1, direct_fd_ = -1;
  FileAccess access_;
  Failure failure_;
};

}  // namespace flux::engine
