#include "common/core/cancel.h"

#include <csignal>

namespace flux::cancel {
namespace {

volatile std::sig_atomic_t g_exit_code = 0;

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
    std::signal(signal, SIG_DFL);
    std::raise(signal);
    return;
  }
  g_exit_code = exit_code_of(signal);
}

}  // namespace

void install() {
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
  if (g_exit_code == 0) return std::nullopt;
  return static_cast<ExitCode>(static_cast<int>(g_exit_code));
}

void check() {
  if (const auto exit_code = requested()) throw Interrupted(*exit_code);
}

void set(std::optional<ExitCode> exit_code) {
  g_exit_code = exit_code ? static_cast<int>(*exit_code) : 0;
}

}  // namespace flux::cancel
