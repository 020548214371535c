// common/dist/launch.h - which of several processes this is, from whatever started them.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace flux::dist {

/// A process of a run, and where all of them meet.
struct Launch {
  int64_t rank = 0, world = 1;
  int64_t local_rank = 0, local_world = 1;  // among those on its machine
  bool own_gpus = false;                    // the launcher shows each process its own GPUs alone
  std::string launcher{};  // "torchrun", "srun", "mpirun", "flags"; empty: one process
  std::string job{};       // differs between runs that may meet at the same place
  /// A TCP store. Empty: rank 0 writes its address to a file that all can read, `file` if that is given.
  std::string host{}, file{};
  int64_t port = 0;
  bool hosted = false;  // the launcher's agent keeps the store, else rank 0 does

  bool several() const { return world > 1; }
  /// "rank 2 of 4 (local 0 of 2), by srun, meeting at 10.0.0.1:29500"
  std::string describe() const;
};

/// What the user said; goes before the environment.
struct LaunchFlags {
  std::optional<int64_t> rank{}, world{};  // both or none
  std::string store{};  // "HOST:PORT", or the path of a file, with a slash; empty: as the launcher says
};

/// The value of an environment variable; nothing: it is not set.
using Environment = std::function<std::optional<std::string>(const std::string& name)>;
Environment process_environment();

/// Resolves, in this order: flags; torchrun (RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT,
/// TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_RUN_ID); Open MPI (OMPI_COMM_WORLD_*); PMI
/// (PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS); a task of srun (SLURM_STEP_ID SLURM_PROCID SLURM_STEP_NUM_TASKS
/// SLURM_LOCALID; with SLURM_GPUS_PER_TASK each sees its own GPUs). A batch script of Slurm itself is one process,
/// whatever --ntasks is; so is a shell that srun started. MASTER_ADDR and MASTER_PORT, where both are set, name the store
/// for every launcher.
/// Throws UsageError: values that are no numbers, a rank that is not below the world's size, one of two flags, a store
/// that is neither HOST:PORT nor a path.
///
/// Source: torch.distributed.rendezvous (`_create_c10d_store`), srun(1), the environment pages of Open MPI 4 and of
/// Hydra.
Launch resolve_launch(const Environment& environment, const LaunchFlags& flags);

}  // namespace flux::dist
