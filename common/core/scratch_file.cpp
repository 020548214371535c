#include "common/core/scratch_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <system_error>
#include <utility>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux {
namespace {

// Large enough for a disk's full rate, small enough that a signal is noticed.
constexpr size_t kChunkBytes = size_t{16} << 20;

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

void ScratchFile::fail(const char* what, int error) const {
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  throw ResourceError(fmt::format("scratch file for {} in {} {}: {}",
                                  purpose_,
                                  show(folder_),
                                  what,
                                  std::generic_category().message(error)),
                      full
                          ? "free some space, or give a folder on a larger disk with --scratch"
                          : "check that the folder can be written, or give another with --scratch");
}

void ScratchFile::reserve(int64_t size) {
  const int error = posix_fallocate(file_, 0, size);
  if (error == 0) return;
  if (error != ENOSPC && error != EDQUOT && error != EFBIG) fail("cannot be grown", error);
  std::error_code ignored;
  const auto space = std::filesystem::space(folder_, ignored);
  throw ResourceError(fmt::format("{}: no space for {}: {} needed, {} free",
                                  show(folder_),
                                  purpose_,
                                  show_bytes(static_cast<uint64_t>(size)),
                                  show_bytes(ignored ? 0 : space.available)),
                      "free some space, or give a folder on a larger disk with --scratch");
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
