#include "common/engine/record_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <string>

#include "common/core/memory_limit.h"
#include "common/engine/record_layout.h"
#include "common/engine/record_store.h"

namespace flux::engine {
namespace {

/// Of one system call, so that a thread that is told to stop does soon.
constexpr size_t kCallBytes = size_t{8} << 20;
constexpr int64_t kBlock = kRecordAlignment;  // of O_DIRECT

int64_t down(int64_t value) { return value / kBlock * kBlock; }
int64_t up(int64_t value) { return down(value + kBlock - 1); }
bool is_aligned(const void* memory) { return reinterpret_cast<uintptr_t>(memory) % kBlock == 0; }

}  // namespace

int64_t available_memory_bytes() {
  const auto of_system = number_in("/proc/meminfo", "MemAvailable:");
  int64_t available = of_system ? *of_system * 1024 : INT64_MAX;
  if (const auto left = memory_left_by_limits()) available = std::min(available, *left);
  return available;
}

FileAccess choose_access(FileAccess access, int64_t bytes, int64_t available) {
  if (access != FileAccess::kAuto) return access;
  return bytes <= available / 2 ? FileAccess::kCached : FileAccess::kDirect;
}
FileAccess choose_access(FileAccess access, int64_t bytes) {
  return choose_access(access, bytes, available_memory_bytes());
}

RecordFile::RecordFile(int fd, FileAccess access, Failure failure)
    : fd_(fd), access_(access), failure_(std::move(failure)) {
  if (access_ != FileAccess::kDirect) return;
  const int mode = fcntl(fd_, F_GETFL) & O_ACCMODE;
  const auto name = fmt::format("/proc/self/fd/{}", fd_);
  direct_fd_ = open(name.c_str(), mode | O_DIRECT | O_CLOEXEC);
  if (direct_fd_ < 0) access_ = FileAccess::kDropped;
}

RecordFile::~RecordFile() {
  if (direct_fd_ >= 0) close(direct_fd_);
  close(fd_);
}

void RecordFile::read_plain(int fd, int64_t offset, std::span<std::byte> to) const {
  size_t done = 0;
  while (done < to.size()) {
    const ssize_t got = pread(fd,
                              to.data() + done,
                              std::min(kCallBytes, to.size() - done),
                              offset + static_cast<int64_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) std::rethrow_exception(failure_("cannot be read", errno));
    if (got == 0)
      std::rethrow_exception(failure_(fmt::format("ends at byte {}, but {} bytes at {} are wanted",
                                                  offset + static_cast<int64_t>(done),
                                                  to.size(),
                                                  offset),
                                      0));
    done += static_cast<size_t>(got);
  }
}

void RecordFile::write_plain(int fd, int64_t offset, std::span<const std::byte> from) const {
  size_t done = 0;
  while (done < from.size()) {
    const ssize_t put = pwrite(fd,
                               from.data() + done,
                               std::min(kCallBytes, from.size() - done),
                               offset + static_cast<int64_t>(done));
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) std::rethrow_exception(failure_("cannot be written", put < 0 ? errno : ENOSPC));
    done += static_cast<size_t>(put);
  }
}

void RecordFile::forget(int64_t offset, int64_t bytes) const {
  if (access_ == FileAccess::kDropped) posix_fadvise(fd_, offset, bytes, POSIX_FADV_DONTNEED);
}

void RecordFile::read(int64_t offset, std::span<std::byte> to) const {
  if (access_ != FileAccess::kDirect) {
    read_plain(fd_, offset, to);
    forget(offset, static_cast<int64_t>(to.size()));
    return;
  }
  if (offset % kBlock == 0 && is_aligned(to.data())) {
    const auto body = static_cast<size_t>(down(static_cast<int64_t>(to.size())));
    read_plain(direct_fd_, offset, to.first(body));
    offset += static_cast<int64_t>(body);
    to = to.subspan(body);
  }
  if (to.empty()) return;
  const auto wanted = static_cast<int64_t>(to.size());
  const HostMemory bounce(std::min(kBounceBytes, up(offset + wanted) - down(offset)),
                          MemoryCause::kRing);
  while (!to.empty()) {
    const int64_t begin = down(offset), skip = offset - begin;
    const int64_t take = std::min(static_cast<int64_t>(to.size()), bounce.bytes() - skip);
    int64_t have = 0;  // the last block of the file may be short
    while (have < skip + take) {
      const ssize_t got = pread(direct_fd_,
                                bounce.data() + have,
                                static_cast<size_t>(up(skip + take) - have),
                                begin + have);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) std::rethrow_exception(failure_("cannot be read", errno));
      have += got;
      if (have < skip + take && (got == 0 || have % kBlock != 0))
        std::rethrow_exception(failure_(
            fmt::format(
                "ends at byte {}, but {} bytes at {} are wanted", begin + have, take, offset),
            0));
    }
    std::memcpy(to.data(), bounce.data() + skip, static_cast<size_t>(take));
    offset += take;
    to = to.subspan(static_cast<size_t>(take));
  }
}

void RecordFile::write(int64_t offset, std::span<const std::byte> from) const {
  const auto bytes = static_cast<int64_t>(from.size());
  if (access_ == FileAccess::kDirect && offset % kBlock == 0 && bytes % kBlock == 0) {
    if (is_aligned(from.data())) return write_plain(direct_fd_, offset, from);
    const HostMemory bounce(std::min(kBounceBytes, bytes), MemoryCause::kRing);
    for (int64_t done = 0; done < bytes; done += bounce.bytes()) {
      const int64_t take = std::min(bounce.bytes(), bytes - done);
      std::memcpy(bounce.data(), from.data() + done, static_cast<size_t>(take));
      write_plain(direct_fd_, offset + done, {bounce.data(), static_cast<size_t>(take)});
    }
    return;
  }
  write_plain(fd_, offset, from);
  if (access_ == FileAccess::kDropped) {
    // only what is on the disk can be forgotten
    sync_file_range(
        fd_,
        offset,
        bytes,
        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    forget(offset, bytes);
  }
}

void RecordFile::prefetch(int64_t offset, int64_t bytes) const {
  if (access_ != FileAccess::kDirect) posix_fadvise(fd_, offset, bytes, POSIX_FADV_WILLNEED);
}

}  // namespace flux::engine
