#include "common/dist/launch.h"

#include <gmock/gmock.h>

#include <map>

#include "common/core/error.h"

namespace flux::dist {
namespace {

using testing::AllOf;
using testing::HasSubstr;

Launch launch(const std::map<std::string, std::string>& variables, const LaunchFlags& flags = {}) {
  return resolve_launch(
      [&](const std::string& name) {
        const auto found = variables.find(name);
        return found == variables.end() ? std::optional<std::string>() : found->second;
      },
      flags);
}

std::string refusal(const std::map<std::string, std::string>& variables,
                    const LaunchFlags& flags = {}) {
  try {
    launch(variables, flags);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Launch, IsOneProcessWhereNothingStartedSeveral) {
  const Launch alone =
      launch({{"PATH", "/bin"}, {"MASTER_ADDR", "10.0.0.1"}, {"MASTER_PORT", "29500"}});
  EXPECT_EQ(alone.rank, 0);
  EXPECT_EQ(alone.world, 1);
  EXPECT_FALSE(alone.several());
  EXPECT_EQ(alone.describe(), "one process");
}

TEST(Launch, OfTorchrunUsesItsAgentsStore) {
  const Launch l = launch({{"RANK", "5"},
                           {"WORLD_SIZE", "8"},
                           {"LOCAL_RANK", "1"},
                           {"LOCAL_WORLD_SIZE", "4"},
                           {"MASTER_ADDR", "node-1"},
                           {"MASTER_PORT", "29400"},
                           {"TORCHELASTIC_USE_AGENT_STORE", "True"},
                           {"TORCHELASTIC_RUN_ID", "job"},
                           {"TORCHELASTIC_RESTART_COUNT", "2"}});
  EXPECT_EQ(l.launcher, "torchrun");
  EXPECT_EQ(l.rank, 5);
  EXPECT_EQ(l.world, 8);
  EXPECT_EQ(l.local_rank, 1);
  EXPECT_EQ(l.local_world, 4);
  EXPECT_EQ(l.host, "node-1");
  EXPECT_EQ(l.port, 29400);
  EXPECT_TRUE(l.hosted);
  EXPECT_EQ(l.job, "job") << "machines count restarts differently";
  EXPECT_EQ(l.describe(), "rank 5 of 8 (local 1 of 4), by torchrun, meeting at node-1:29400");
}

TEST(Launch, WithoutAnAgentRankZeroKeepsTheStore) {
  std::map<std::string, std::string> variables{
      {"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "::1"}, {"MASTER_PORT", "1"}};
  EXPECT_FALSE(launch(variables).hosted);
  EXPECT_EQ(launch(variables).host, "::1");
  variables["TORCHELASTIC_USE_AGENT_STORE"] = "True";
  // another store than the agent's is nobody's but ours
  EXPECT_FALSE(launch(variables, {.store = "[fd00::1]:700"}).hosted);
  EXPECT_EQ(launch(variables, {.store = "[fd00::1]:700"}).host, "fd00::1");
}

TEST(Launch, OfSrunIsATaskOfAStep) {
  std::map<std::string, std::string> task{{"SLURM_JOB_ID", "77"},
                                          {"SLURM_STEP_ID", "0"},
                                          {"SLURM_PROCID", "3"},
                                          {"SLURM_NTASKS", "4"},
                                          {"SLURM_STEP_NUM_TASKS", "4"},
                                          {"SLURM_STEP_TASKS_PER_NODE", "1,2,1"},
                                          {"SLURM_GTIDS", "2,3"},
                                          {"SLURM_LOCALID", "1"}};
  const Launch l = launch(task);
  EXPECT_EQ(l.launcher, "srun");
  EXPECT_EQ(l.rank, 3);
  EXPECT_EQ(l.world, 4);
  EXPECT_EQ(l.local_rank, 1);
  EXPECT_EQ(l.local_world, 2) << "of this node, whatever the first one has";
  EXPECT_EQ(l.job, "77.0.");
  EXPECT_TRUE(l.host.empty()) << "rank 0 writes its address down";
  EXPECT_FALSE(l.own_gpus);
  task["SLURM_GPUS_PER_TASK"] = "1";
  EXPECT_TRUE(launch(task).own_gpus);
  task["SLURM_RESTART_COUNT"] = "1";
  EXPECT_NE(launch(task).job, l.job) << "a requeued job does not meet its former self";
  // the batch script itself: --ntasks is set there too
  task.erase("SLURM_STEP_ID");
  EXPECT_FALSE(launch(task).several());
}

TEST(Launch, OfMpirunKnowsOpenMpiAndPmi) {
  const Launch ompi = launch({{"OMPI_COMM_WORLD_RANK", "1"},
                              {"OMPI_COMM_WORLD_SIZE", "2"},
                              {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                              {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}});
  EXPECT_EQ(ompi.launcher, "mpirun");
  EXPECT_EQ(ompi.rank, 1);
  EXPECT_EQ(ompi.local_world, 2);
  const Launch pmi = launch(
      {{"PMI_RANK", "2"}, {"PMI_SIZE", "3"}, {"MPI_LOCALRANKID", "0"}, {"MPI_LOCALNRANKS", "1"}});
  EXPECT_EQ(pmi.launcher, "mpirun");
  EXPECT_EQ(pmi.rank, 2);
  EXPECT_EQ(pmi.world, 3);
}

TEST(Launch, TheNearestLauncherCounts) {
  // torchrun started by srun, and mpirun inside of a batch script
  const Launch l = launch({{"SLURM_STEP_ID", "0"},
                           {"SLURM_PROCID", "1"},
                           {"SLURM_STEP_NUM_TASKS", "2"},
                           {"RANK", "9"},
                           {"WORLD_SIZE", "16"},
                           {"MASTER_ADDR", "a"},
                           {"MASTER_PORT", "2"}});
  EXPECT_EQ(l.launcher, "torchrun");
  EXPECT_EQ(l.rank, 9);
}

TEST(Launch, FlagsGoFirst) {
  const std::map<std::string, std::string> torchrun{
      {"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "2"}};
  const Launch l = launch(torchrun, {.rank = 2, .world = 3, .store = "b:9"});
  EXPECT_EQ(l.launcher, "flags");
  EXPECT_EQ(l.rank, 2);
  EXPECT_EQ(l.world, 3);
  EXPECT_EQ(l.host, "b");
  EXPECT_EQ(l.port, 9);
  EXPECT_FALSE(launch(torchrun, {.rank = 0, .world = 1}).several());
}

TEST(Launch, TakesAPathForAFileWhereAllMeet) {
  const std::map<std::string, std::string> torchrun{{"RANK", "0"},
                                                    {"WORLD_SIZE", "2"},
                                                    {"MASTER_ADDR", "head"},
                                                    {"MASTER_PORT", "29500"},
                                                    {"TORCHELASTIC_USE_AGENT_STORE", "True"}};
  const Launch by_file = launch(torchrun, {.store = "./ranks:1"});
  EXPECT_EQ(by_file.file, "./ranks:1");
  EXPECT_EQ(by_file.host, "");
  EXPECT_FALSE(by_file.hosted);
}

TEST(Launch, NamesWhatIsWrong) {
  EXPECT_THAT(refusal({{"RANK", "x"}, {"WORLD_SIZE", "2"}}),
              AllOf(HasSubstr("RANK is 'x'"), HasSubstr("hint:")));
  EXPECT_THAT(refusal({{"RANK", "2"}, {"WORLD_SIZE", "2"}}),
              HasSubstr("RANK is 2, but WORLD_SIZE is 2"));
  EXPECT_THAT(refusal({{"OMPI_COMM_WORLD_RANK", "0"}}),
              HasSubstr("OMPI_COMM_WORLD_SIZE is not set"));
  EXPECT_THAT(refusal({}, {.rank = 0}), HasSubstr("--dist-rank is given without --dist-world"));
  EXPECT_THAT(refusal({}, {.world = 2}), HasSubstr("--dist-world is given without --dist-rank"));
  EXPECT_THAT(refusal({}, {.rank = 3, .world = 2}),
              HasSubstr("--dist-rank is 3, but --dist-world is 2"));
  for (const char* store : {"host", "host:", ":5", "host:0", "host:70000", "host:x"})
    EXPECT_THAT(refusal({}, {.rank = 0, .world = 2, .store = store}), HasSubstr("is not HOST:PORT"))
        << store;
  EXPECT_THAT(
      refusal({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}}),
      HasSubstr("MASTER_ADDR"));
}

}  // namespace
}  // namespace flux::dist
