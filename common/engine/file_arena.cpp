#include "common/engine/file_arena.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <numeric>
#include <system_error>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"

namespace flux::engine {
namespace {

std::string reason(int number) { return std::generic_category().message(number); }

[[noreturn]] void refuse_room(const std::filesystem::path& folder,
                              int64_t needed,
                              std::optional<uint64_t> free,
                              int number) {
  throw ResourceError(
      fmt::format("{}: no room for the scratch file: it needs {} bytes ({}), {}{}",
                  show(folder),
                  needed,
                  show_bytes(static_cast<uint64_t>(needed)),
                  free ? fmt::format("{} bytes ({}) are free", *free, show_bytes(*free))
                       : std::string("the disk refuses"),
                  number == 0 || number == ENOSPC ? "" : ": " + reason(number)),
      "free disk space, or give a scratch folder on a larger disk");
}

std::optional<uint64_t> free_bytes(const std::filesystem::path& folder) {
  struct statvfs disk {};
  if (statvfs(folder.c_str(), &disk) != 0) return std::nullopt;
  return uint64_t{disk.f_bavail} * disk.f_frsize;
}

/// A file that has no name any more.
int open_nameless(const std::filesystem::path& folder) {
  int fd = open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0) return fd;
  if (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL) {
    const auto path = folder / fmt::format(".flux-scratch-{}", random_name());
    fd = open(path.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd >= 0) {
      unlink(path.c_str());
      return fd;
    }
  }
  throw ResourceError(
      fmt::format("{}: no scratch file can be made there: {}", show(folder), reason(errno)),
      "give a folder that is there and writable");
}

}  // namespace

FileArena::FileArena(const std::filesystem::path& folder,
                     std::vector<int64_t> record_bytes,
                     FileAccess access)
    : bytes_(std::move(record_bytes)) {
  begins_.push_back(0);
  for (const int64_t length : bytes_) begins_.push_back(begins_.back() + length);
  const int64_t total = begins_.back();
  const auto failure = [folder](const std::string& what, int number) {
    return std::make_exception_ptr(
        ResourceError(fmt::format("{}: the scratch file {}{}",
                                  show(folder),
                                  what,
                                  number == 0 ? "" : ": " + reason(number)),
                      number == 0 ? "somebody shortened it" : write_failure_hint(number)));
  };
  file_ =
      std::make_unique<RecordFile>(open_nameless(folder), choose_access(access, total), failure);
  if (total == 0) return;
  // first asked, so that the disk is not filled to the brim for a moment
  const auto free = free_bytes(folder);
  if (free && *free < static_cast<uint64_t>(total)) refuse_room(folder, total, free, 0);
  int error = 0;
  do {
    error = posix_fallocate(file_->fd(), 0, total);
  } while (error == EINTR);
  if (error != 0) refuse_room(folder, total, free, error);
}

FileArena::~FileArena() = default;

void FileArena::read(int64_t index, int64_t offset, std::span<std::byte> to) const {
  check_range(index, offset, to.size());
  file_->read(begins_[static_cast<size_t>(index)] + offset, to);
}

void FileArena::write(int64_t index, int64_t offset, std::span<const std::byte> from) {
  check_range(index, offset, from.size());
  file_->write(begins_[static_cast<size_t>(index)] + offset, from);
}

void FileArena::prefetch(int64_t index) const {
  file_->prefetch(begins_.at(static_cast<size_t>(index)), record_bytes(index));
}

int64_t FileArena::staging_bytes() const {
  // memory and places are aligned: nothing goes over the buffer
  return 0;
}

}  // namespace flux::engine
