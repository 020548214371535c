#include "common/core/cancel.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

#include "common/core/deadline.h"
#include "common/core/process.h"

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

// A second SIGTERM after `wait` microseconds, in a process that `launcher` (a variable) started.
[[noreturn]] void receive_twice(const char* launcher, useconds_t wait) {
  for (const char* name : {"TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"})
    unsetenv(name);
  if (launcher) setenv(launcher, "0", 1);
  cancel::install();
  std::raise(SIGTERM);
  usleep(wait);
  std::raise(SIGTERM);
  std::_Exit(static_cast<int>(*cancel::requested()));
}

TEST(CancelDeathTest, ASecondSignalEndsTheProcess) {
  EXPECT_EXIT(receive_twice(nullptr, 0), testing::KilledBySignal(SIGTERM), "");
}

TEST(CancelDeathTest, ASignalThatALauncherRepeatsIsOne) {
  // torchrun and mpirun pass on what their ranks were sent already
  EXPECT_EXIT(receive_twice("TORCHELASTIC_RUN_ID", 1000), testing::ExitedWithCode(143), "");
  EXPECT_EXIT(receive_twice("OMPI_COMM_WORLD_RANK", 1000), testing::ExitedWithCode(143), "");
  EXPECT_EXIT(receive_twice("PMI_RANK", 3'100'000), testing::KilledBySignal(SIGTERM), "");
}

TEST(CancelDeadline, AsksAsSigtermDoes) {
  EXPECT_FALSE(cancel::requested());
  cancel::set_deadline(process_seconds() + 1000);
  EXPECT_FALSE(cancel::requested());
  cancel::set_deadline(process_seconds());
  EXPECT_EQ(cancel::requested(), ExitCode::kTerminate);
  EXPECT_THROW(cancel::check(), Interrupted);
  cancel::set_deadline(std::nullopt);
  EXPECT_FALSE(cancel::requested());
}

// a job's end may send a signal while the run that its limit ended still saves
[[noreturn]] void receive_after_deadline() {
  cancel::install();
  cancel::set_deadline(0);
  std::raise(SIGTERM);
  std::_Exit(static_cast<int>(*cancel::requested()));
}

TEST(CancelDeathTest, TheFirstSignalAfterTheDeadlineEndsNothing) {
  EXPECT_EXIT(receive_after_deadline(), testing::ExitedWithCode(143), "");
}

}  // namespace
}  // namespace flux
