#include "common/core/process.h"

#include <fmt/format.h>
#include <time.h>
#include <unistd.h>

#include <fstream>
#include <iterator>

#include "common/core/text.h"

namespace flux {

std::optional<ProcessStat> process_stat(pid_t pid) {
  std::ifstream file(fmt::format("/proc/{}/stat", pid));
  const std::string stat(std::istreambuf_iterator<char>(file), {});
  const size_t end = stat.rfind(") ");  // of the program's name, which may hold anything
  if (end == std::string::npos) return std::nullopt;
  const auto fields = split(stat.substr(end + 2), ' ');  // from the third on
  if (fields.size() <= 19 || fields[0].empty()) return std::nullopt;
  return ProcessStat{fields[0][0], fields[19]};
}

double process_seconds() {
  static const double started = [] {
    const auto stat = process_stat(getpid());
    return stat ? std::stod(stat->start_ticks) / static_cast<double>(sysconf(_SC_CLK_TCK)) : 0;
  }();
  timespec now{};
  clock_gettime(CLOCK_BOOTTIME, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9 - started;
}

}  // namespace flux
