#include "pipelines/train/append_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"

namespace flux::train {

AppendFile::AppendFile(std::filesystem::path path)
    : path_(std::move(path)),
      fd_(open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666)) {
  if (fd_ < 0) fail();
}

AppendFile::~AppendFile() { close(fd_); }

void AppendFile::fail() const {
  const int number = errno;
  throw ResourceError(fmt::format("{}: cannot be written: {}", show(path_), std::strerror(number)),
                      write_failure_hint(number));
}

void AppendFile::write(std::string_view record) {
  errno = 0;
  if (::write(fd_, record.data(), record.size()) != static_cast<ssize_t>(record.size())) {
    if (errno == 0) errno = ENOSPC;  // a short write
    fail();
  }
}

void AppendFile::flush() {
  if (!flush_to_disk(fd_)) fail();
}

}  // namespace flux::train
