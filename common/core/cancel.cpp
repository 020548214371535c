#include "common/core/cancel.h"

#include <time.h>

#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <limits>

#include "common/core/deadline.h"
#include "common/core/log.h"
#include "common/core/process.h"

namespace flux::cancel {
namespace {

volatile std::sig_atomic_t g_exit_code = 0;
std::atomic<double> g_deadline = std::numeric_limits<double>::infinity();

// A launcher passes on the signal that its ranks have got already, so that they get it twice. It is once.
constexpr int64_t kRepeatMilliseconds = 3000;
std::atomic<bool> g_is_launched = false;
std::atomic<int64_t> g_first_signal = 0;  // milliseconds

int64_t milliseconds_now() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000;
}

int exit_code_of(int signal) {
  switch (signal) {
    case SIGHUP:
      return static_cast<int>(ExitCode::kHangUp);
    case SIGINT:
      return static_cast<int>(ExitCode::kInterrupt);
    default:
      return static_cast<int>(ExitCode::kTerminate);
  }
}

extern "C" void on_signal(int signal) {
  if (g_exit_code != 0) {
    if (g_is_launched && milliseconds_now() - g_first_signal < kRepeatMilliseconds) return;
    std::signal(signal, SIG_DFL);
    std::raise(signal);
    return;
  }
  g_first_signal = milliseconds_now();
  g_exit_code = exit_code_of(signal);
}

}  // namespace

void install() {
  for (const char* name : {"TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"})
    if (std::getenv(name)) g_is_launched = true;
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART | SA_NODEFER;  // a save in progress must not see EINTR
  sigemptyset(&action.sa_mask);
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) sigaction(signal, &action, nullptr);
  struct sigaction inherited {};
  sigaction(SIGHUP, nullptr, &inherited);
  if (inherited.sa_handler != SIG_IGN) sigaction(SIGHUP, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
}

std::optional<ExitCode> requested() {
  if (g_exit_code == 0) {
    const double deadline = g_deadline;
    if (deadline < std::numeric_limits<double>::infinity() && process_seconds() >= deadline)
      return ExitCode::kTerminate;
    return std::nullopt;
  }
  return static_cast<ExitCode>(static_cast<int>(g_exit_code));
}

void check() {
  const auto exit_code = requested();
  if (!exit_code) return;
  if (g_exit_code == 0) log::warn("the time limit is reached");
  throw Interrupted(*exit_code);
}

void set(std::optional<ExitCode> exit_code) {
  g_exit_code = exit_code ? static_cast<int>(*exit_code) : 0;
}

void set_deadline(std::optional<double> seconds) {
  g_deadline = seconds.value_or(std::numeric_limits<double>::infinity());
}

}  // namespace flux::cancel
