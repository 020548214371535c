#include "common/core/cancel.h"

#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>

namespace flux {
namespace {

// What a process that inherits `before` makes of `signal`; 0: nothing.
[[noreturn]] void receive(int signal, void (*before)(int)) {
  std::signal(signal, before);
  cancel::install();
  cancel::install();  // run_tool comes after early_signals.cpp
  std::raise(signal);
  const auto code = cancel::requested();
  std::_Exit(code ? static_cast<int>(*code) : 0);
}

int code_of(int signal, void (*before)(int)) {
  int code = -1;
  const auto keep = [&code](int status) {
    code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    return true;
  };
  EXPECT_EXIT(receive(signal, before), keep, "");
  return code;
}

TEST(CancelDeathTest, EverySignalHasItsExitCode) {
  EXPECT_EQ(code_of(SIGINT, SIG_DFL), 130);
  EXPECT_EQ(code_of(SIGTERM, SIG_DFL), 143);
  EXPECT_EQ(code_of(SIGUSR1, SIG_DFL), 143);
  EXPECT_EQ(code_of(SIGHUP, SIG_DFL), 129);
}

TEST(CancelDeathTest, NohupsChoiceIsKept) {
  EXPECT_EQ(code_of(SIGHUP, SIG_IGN), 0);
  EXPECT_EQ(code_of(SIGINT, SIG_IGN), 130);  // shells ignore it for every background job
}

}  // namespace
}  // namespace flux
