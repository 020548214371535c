#include "common/core/process.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

namespace flux {
namespace {

TEST(ProcessStat, TellsProcessesApart) {
  const auto self = process_stat(getpid());
  ASSERT_TRUE(self);
  EXPECT_FALSE(self->start_ticks.empty());
  EXPECT_EQ(process_stat(getpid())->start_ticks, self->start_ticks);
  const pid_t child = fork();
  if (child == 0) _exit(0);
  siginfo_t info{};
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT), 0);
  const auto zombie = process_stat(child);  // ended, and nobody has asked how
  ASSERT_TRUE(zombie);
  EXPECT_EQ(zombie->state, 'Z');
  EXPECT_GE(std::stoll(zombie->start_ticks), std::stoll(self->start_ticks));
  EXPECT_EQ(waitpid(child, nullptr, 0), child);
  EXPECT_FALSE(process_stat(child));
}

TEST(ProcessSeconds, CountsFromTheStartOfTheProcess) {
  const double before = process_seconds();
  EXPECT_GE(before, 0);
  EXPECT_LT(before, 3600);  // not from the boot of the machine
  usleep(30'000);
  EXPECT_GT(process_seconds(), before + 0.025);
}

}  // namespace
}  // namespace flux
