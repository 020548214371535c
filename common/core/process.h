// common/core/process.h - what the system knows of processes (/proc).
#pragma once
#include <sys/types.h>

#include <optional>
#include <string>

namespace flux {

struct ProcessStat {
  char state = '?';  // 'R', 'S', ..., 'Z' of a zombie
  std::string
      start_ticks;  // after boot, as the system writes them: with the pid they name a process
};
/// Nothing if there is no such process, or it cannot be read.
std::optional<ProcessStat> process_stat(pid_t pid);

/// Seconds since this process was started, to 10 ms: what the loader does before main() counts too.
double process_seconds();

}  // namespace flux
