// common/core/cancel.h - SIGINT, SIGTERM, SIGHUP and SIGUSR1: finish what is in hand, save, exit.
#pragma once
#include <optional>

#include "common/core/error.h"

namespace flux::cancel {

/// Installs the handlers: the first signal asks the work to save and stop, a second one ends the
/// process at once. SIGPIPE and SIGXFSZ are ignored, so that a failing write is an error with a
/// message. run_tool calls it.
void install();
/// The exit code asked for, once a signal has come: 129, 130, 143 (143 for SIGUSR1 too, for
/// requeueing).
std::optional<ExitCode> requested();
/// Throws Interrupted if a signal has come. For loops that have nothing to save.
void check();
/// For tests: as if `exit_code`'s signal had come, or none.
void set(std::optional<ExitCode> exit_code);

}  // namespace flux::cancel
