#include "common/core/scratch_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <optional>
#include <system_error>
#include <utility>

#include "common/core/text.h"

namespace flux {
namespace {

// Large enough for a disk's full rate, small enough that a signal is noticed.
constexpr size_t kChunkBytes = size_t{16} << 20;

bool is_full(int error) { return error == ENOSPC || error == EDQUOT || error == EFBIG; }

int open_unnamed(const std::filesystem::path& folder) {
  const int file = open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (file >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT && errno != EINVAL))
    return file;
  std::string name = (folder / ".scratch-XXXXXX").string();
  const int named = mkostemp(name.data(), O_CLOEXEC);
  if (named >= 0) unlink(name.c_str());
  return named;
}

}  // namespace

ScratchFile::ScratchFile(std::filesystem::path folder, std::string purpose)
    : folder_(std::move(folder)), purpose_(std::move(purpose)) {
  std::error_code error;
  std::filesystem::create_directories(folder_, error);
  if (!error) file_ = open_unnamed(folder_);
  if (file_ < 0) fail("cannot be made", error ? error.value() : errno);
}

ScratchFile::~ScratchFile() {
  if (file_ >= 0) close(file_);
}

int ScratchFile::release() { return std::exchange(file_, -1); }

ResourceError ScratchFile::failure(const std::filesystem::path& folder,
                                   const std::string& purpose,
                                   const std::string& what,
                                   int error_number) {
  return ResourceError(
      fmt::format("scratch file for {} in {} {}: {}",
                  purpose,
                  show(folder),
                  what,
                  std::generic_category().message(error_number)),
      is_full(error_number)
          ? "free some space, or give a folder on a larger disk with --scratch"
          : "check that the folder can be written, or give another with --scratch");
}

void ScratchFile::fail(const char* what, int error) const {
  throw failure(folder_, purpose_, what, error);
}

void ScratchFile::reserve(int64_t size) {
  if (size == 0) return;
  const auto refuse = [&](const std::optional<uint64_t>& free, int number) {
    throw ResourceError(
        fmt::format("{}: no space for {}: {} bytes ({}) needed, {}{}",
                    show(folder_),
                    purpose_,
                    size,
                    show_bytes(static_cast<uint64_t>(size)),
                    free ? fmt::format("{} bytes ({}) are free", *free, show_bytes(*free))
                         : std::string("the disk refuses"),
                    number == ENOSPC ? "" : ": " + std::generic_category().message(number)),
        "free some space, or give a folder on a larger disk with --scratch");
  };
  // first asked, so that the disk is not filled to the brim for a moment
  struct statvfs disk {};
  std::optional<uint64_t> free;
  if (fstatvfs(file_, &disk) == 0) free = uint64_t{disk.f_bavail} * disk.f_frsize;
  if (free && *free < static_cast<uint64_t>(size)) refuse(free, ENOSPC);
  int error = 0;
  do {
    error = posix_fallocate(file_, 0, size);
  } while (error == EINTR);
  if (error != 0 && !is_full(error)) fail("cannot be grown", error);
  if (error != 0) refuse(free, error);
}

void ScratchFile::read(int64_t offset, std::span<std::byte> to) const {
  while (!to.empty()) {
    const ssize_t count = pread(file_, to.data(), std::min(to.size(), kChunkBytes), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail("cannot be read", count < 0 ? errno : EIO);
    to = to.subspan(static_cast<size_t>(count));
    offset += count;
  }
}

void ScratchFile::write(int64_t offset, std::span<const std::byte> from) {
  while (!from.empty()) {
    const ssize_t count = pwrite(file_, from.data(), std::min(from.size(), kChunkBytes), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail("cannot be written", count < 0 ? errno : EIO);
    from = from.subspan(static_cast<size_t>(count));
    offset += count;
  }
}

}  // namespace flux
