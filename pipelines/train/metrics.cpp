#include "pipelines/train/metrics.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"

namespace flux::train {
namespace {

[[noreturn]] void fail(const std::filesystem::path& file) {
  const int number = errno;
  throw ResourceError(fmt::format("{}: cannot be written: {}", show(file), std::strerror(number)),
                      write_failure_hint(number));
}

}  // namespace

Metrics::Metrics(const std::filesystem::path& file, int64_t last_step) : file_(file) {
  std::string kept;
  if (last_step > 0 && std::filesystem::exists(file)) {
    for (const std::string& line : split(read_file(file), '\n')) {
      const auto object = nlohmann::json::parse(line, nullptr, false);
      if (object.is_object() && object.value("step", nlohmann::json()).is_number_integer() &&
          object["step"] <= last_step) {
        kept += line + "\n";
      }
    }
  }
  write_file_atomic(file, kept);
  fd_ = open(file.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
  if (fd_ < 0) fail(file_);
}

Metrics::~Metrics() { close(fd_); }

void Metrics::write(const nlohmann::json& line) {
  const std::string text = line.dump() + "\n";
  errno = 0;
  if (::write(fd_, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    if (errno == 0) errno = ENOSPC;  // a short write
    fail(file_);
  }
}

}  // namespace flux::train
