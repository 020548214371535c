#include "common/core/memory_limit.h"

#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "tests/support/temporary_folder.h"

namespace flux {
namespace {

namespace fs = std::filesystem;

/// A machine with control groups.
struct Machine {
  test::TemporaryFolder folder;
  void write(const std::string& path, const std::string& text) const {
    const fs::path file = folder / path;
    fs::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  std::optional<int64_t> left() const {
    return memory_left_by_limits(folder / "proc", folder.path());
  }
};

constexpr char kSecond[] =
    "30 25 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
constexpr char kFirst[] =
    "31 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "32 25 0:28 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
    "33 25 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

TEST(MemoryLimit, OfASlurmJobIsAboveItsTask) {
  Machine machine;
  machine.write("proc/mountinfo", kSecond);
  machine.write("proc/cgroup", "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n");
  const std::string job = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/";
  machine.write(job + "step_0/user/task_0/memory.max", "max\n");
  machine.write(job + "step_0/user/task_0/memory.current", "90\n");
  EXPECT_EQ(machine.left(), std::nullopt);
  machine.write(job + "memory.max", "1000\n");
  machine.write(job + "memory.current", "300\n");
  EXPECT_EQ(machine.left(), 700);
  // the page cache is given back when it is needed
  machine.write(job + "memory.stat", "anon 100\ninactive_file 40\nactive_file 10\nfile 60\n");
  EXPECT_EQ(machine.left(), 750);
  machine.write(job + "memory.high", "800\n");
  EXPECT_EQ(machine.left(), 550);
  machine.write("sys/fs/cgroup/system.slice/memory.max", "5000\n");
  machine.write("sys/fs/cgroup/system.slice/memory.current", "4900\n");
  EXPECT_EQ(machine.left(), 100) << "the least of all above";
  machine.write(job + "memory.current", "2000\n");
  EXPECT_EQ(machine.left(), 0) << "over memory.high";
}

TEST(MemoryLimit, OfTheFirstVersion) {
  Machine machine;
  machine.write("proc/mountinfo", kFirst);
  machine.write("proc/cgroup", "5:cpu:/a\n4:memory:/slurm/uid_0/job_7/step_0\n0::/other\n");
  const std::string job = "sys/fs/cgroup/memory/slurm/uid_0/job_7/";
  machine.write(job + "memory.limit_in_bytes", "1000\n");
  machine.write(job + "memory.usage_in_bytes", "300\n");
  machine.write(job + "memory.stat",
                "inactive_file 1\ntotal_inactive_file 40\ntotal_active_file 10\n");
  EXPECT_EQ(machine.left(), 750);
  // no limit is written as a large number
  machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  machine.write("sys/fs/cgroup/memory/memory.usage_in_bytes", "5\n");
  EXPECT_EQ(machine.left(), 750);
}

TEST(MemoryLimit, OfAContainerIsAtTheTop) {
  // the path is the host's, the mount shows the container's group
  for (const char* path : {"/docker/abc", "/"})
    for (const char* seen : {"/docker/abc", "/"}) {
      Machine machine;
      machine.write("proc/mountinfo",
                    "30 25 0:26 " + std::string(seen) + " /sys/fs/cgroup ro - cgroup2 cgroup rw\n");
      machine.write("proc/cgroup", "0::" + std::string(path) + "\n");
      machine.write("sys/fs/cgroup/memory.max", "1000\n");
      machine.write("sys/fs/cgroup/memory.current", "400\n");
      EXPECT_EQ(machine.left(), 600) << path << " seen as " << seen;
    }
}

TEST(MemoryLimit, IsNothingWhereNobodySaysIt) {
  Machine machine;
  EXPECT_EQ(machine.left(), std::nullopt);
  machine.write("proc/cgroup", "garbage\n0::/\n4:memory:/a\n");
  machine.write("proc/mountinfo", "short\n1 2 3 4 - cgroup2\n");
  EXPECT_EQ(machine.left(), std::nullopt);
}

}  // namespace
}  // namespace flux
