// common/core/error.h - the exceptions that carry failures, and the exit codes that they become in
// run_tool.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>

namespace flux {

/// What a program of this project returns to its caller.
enum class ExitCode : int {
  kOk = 0,       // done; --help and --version too
  kBug = 1,      // a bug in this program
  kDiffers = 1,  // of flux-check, verify and diff: compared, and it differs
  kUsage = 2,    // unknown, missing, malformed, out-of-range or contradictory flags
  kInput = 3,    // the user's file: absent, unreadable, wrong kind, wrong shape
  kCache =
      4,  // a cache or checkpoint: absent, not ours, newer, incomplete, made with other weights
  kResource = 5,  // memory, disk or GPU ran out or is not there
  kTooManyFailed =
      6,          // finished, but more items failed than allowed; or kinds unknown to flux-check
  kHangUp = 129,  // stopped by SIGHUP, SIGINT or SIGTERM after a clean save
  kInterrupt = 130,
  kTerminate = 143,
};

/// A failure that the user can act on. `message` says what is wrong, where, and both values
/// (further lines start with two spaces); `hint` is one thing to do.
class Error : public std::runtime_error {
 public:
  Error(ExitCode exit_code, const std::string& message, const std::string& hint)
      : std::runtime_error(hint.empty() ? message : message + "\n  hint: " + hint),
        exit_code_(exit_code) {}
  ExitCode exit_code() const { return exit_code_; }

 private:
  ExitCode exit_code_;
};

struct UsageError : Error {
  explicit UsageError(const std::string& message, const std::string& hint = {})
      : Error(ExitCode::kUsage, message, hint) {}
};
struct InputError : Error {
  explicit InputError(const std::string& message, const std::string& hint = {})
      : Error(ExitCode::kInput, message, hint) {}
};
struct CacheError : Error {
  explicit CacheError(const std::string& message, const std::string& hint = {})
      : Error(ExitCode::kCache, message, hint) {}
};
struct ResourceError : Error {
  explicit ResourceError(const std::string& message, const std::string& hint = {})
      : Error(ExitCode::kResource, message, hint) {}
};
/// Work was stopped by a signal after everything finished was saved; see cancel.h.
struct Interrupted : Error {
  explicit Interrupted(ExitCode exit_code) : Error(exit_code, "stopped by a signal", {}) {}
};

}  // namespace flux
