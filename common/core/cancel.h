// common/core/cancel.h - SIGINT, SIGTERM, SIGHUP and SIGUSR1: finish what is in hand, save, exit.
#pragma once
#include <optional>

#include "common/core/error.h"

namespace flux::cancel {

/// Installs the handlers: the first signal asks the work to save and stop, a second one ends the
/// process at once. SIGHUP stays ignored where it is already (nohup); SIGINT does not, since shells
/// ignore it for all background jobs. SIGPIPE and SIGXFSZ are ignored, so that a failing write is an
/// error with a message. May be called again. early_signals.cpp calls it in the tools before the
/// shared libraries initialise themselves, and run_tool calls it first; a signal that comes earlier
/// still, while the loader maps the libraries, ends the process without exit code 130.
void install();
/// The exit code asked for, once a signal has come: 129, 130, 143 (143 for SIGUSR1 too, for
/// requeueing).
std::optional<ExitCode> requested();
/// Throws Interrupted if a signal has come. For loops that have nothing to save.
void check();
/// For tests: as if `exit_code`'s signal had come, or none.
void set(std::optional<ExitCode> exit_code);

}  // namespace flux::cancel
