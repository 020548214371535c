#include "common/dist/launch.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::dist {
namespace {

constexpr int64_t kMaxWorld = 1 << 20, kMaxPort = 65535;

std::optional<int64_t> parse_number(const std::string& text, int64_t least, int64_t most) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least || value > most)
    return std::nullopt;
  return value;
}

/// Reads numbers of one launcher's variables.
class Variables {
 public:
  Variables(const Environment& environment, std::string launcher)
      : environment_(environment), launcher_(std::move(launcher)) {}

  const std::string& launcher() const { return launcher_; }
  bool has(const std::string& name) const { return environment_(name).has_value(); }
  int64_t number(const std::string& name, int64_t least, int64_t most) const {
    const auto text = environment_(name);
    if (!text)
      throw UsageError(fmt::format("{} started this, but {} is not set", launcher_, name),
                       "set it, or give --dist-rank and --dist-world");
    const auto value = parse_number(*text, least, most);
    if (!value)
      throw UsageError(
          fmt::format(
              "{} is '{}', not a number from {} to {}", name, printable(*text), least, most),
          "set it right, or give --dist-rank and --dist-world");
    return *value;
  }
  int64_t number_or(const std::string& name, int64_t least, int64_t most, int64_t otherwise) const {
    return has(name) ? number(name, least, most) : otherwise;
  }
  std::string text(const std::string& name) const { return environment_(name).value_or(""); }

 private:
  const Environment& environment_;
  std::string launcher_;
};

void set_store(Launch& launch, const std::string& text, const std::string& from) {
  const size_t colon = text.rfind(':');
  const auto port =
      colon == std::string::npos ? std::nullopt : parse_number(text.substr(colon + 1), 1, kMaxPort);
  if (!port || colon == 0)
    throw UsageError(
        fmt::format("{}: '{}' is not HOST:PORT", from, printable(text)),
        "give the name or address of a machine that all ranks reach, and a free port; or a "
        "path with a slash, ./ranks, of a file that all see");
  launch.host = text.substr(0, colon);
  if (launch.host.size() > 2 && launch.host.front() == '[' &&
      launch.host.back() == ']')  // an IPv6 address
    launch.host = launch.host.substr(1, launch.host.size() - 2);
  launch.port = *port;
}

void require_below(int64_t rank,
                   int64_t world,
                   const std::string& rank_name,
                   const std::string& world_name) {
  if (rank < world) return;
  throw UsageError(fmt::format("{} is {}, but {} is {}", rank_name, rank, world_name, world),
                   "ranks count from 0");
}

/// The variables of a launcher; those of the machine may be absent.
struct Names {
  const char *rank, *world, *local_rank, *local_world;
};

Launch read_ranks(const Variables& v, const Names& names) {
  Launch out;
  out.launcher = v.launcher();
  out.world = v.number(names.world, 1, kMaxWorld);
  out.rank = v.number(names.rank, 0, kMaxWorld);
  require_below(out.rank, out.world, names.rank, names.world);
  out.local_rank = v.number_or(names.local_rank, 0, kMaxWorld, 0);
  if (names.local_world) out.local_world = v.number_or(names.local_world, 1, kMaxWorld, 1);
  return out;
}

Launch from_torchrun(const Environment& environment) {
  const Variables v(environment, "torchrun");
  Launch out = read_ranks(v, {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"});
  out.hosted = v.text("TORCHELASTIC_USE_AGENT_STORE") == "True";
  // not TORCHELASTIC_RESTART_COUNT: each machine counts its own
  out.job = v.text("TORCHELASTIC_RUN_ID");
  return out;
}

Launch from_open_mpi(const Environment& environment) {
  const Variables v(environment, "mpirun");
  Launch out = read_ranks(v,
                          {"OMPI_COMM_WORLD_RANK",
                           "OMPI_COMM_WORLD_SIZE",
                           "OMPI_COMM_WORLD_LOCAL_RANK",
                           "OMPI_COMM_WORLD_LOCAL_SIZE"});
  out.job = v.text("OMPI_MCA_ess_base_jobid") + v.text("PMIX_NAMESPACE");
  return out;
}

Launch from_pmi(const Environment& environment) {
  return read_ranks({environment, "mpirun"},
                    {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"});
}

Launch from_slurm(const Environment& environment) {
  const Variables v(environment, "srun");
  Launch out = read_ranks(v, {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", nullptr});
  // "2,3": the tasks on this node
  if (const auto here = v.text("SLURM_GTIDS"); !here.empty())
    out.local_world = std::ranges::count(here, ',') + 1;
  out.own_gpus = v.has("SLURM_GPUS_PER_TASK");
  out.job = fmt::format(
      "{}.{}.{}", v.text("SLURM_JOB_ID"), v.text("SLURM_STEP_ID"), v.text("SLURM_RESTART_COUNT"));
  return out;
}

Launch from_environment(const Environment& environment) {
  const auto has = [&](const char* name) { return environment(name).has_value(); };
  // srun starts tasks whose shells may start torchrun or mpirun: the nearest launcher is asked first
  if (has("RANK") && has("WORLD_SIZE")) return from_torchrun(environment);
  if (has("OMPI_COMM_WORLD_RANK")) return from_open_mpi(environment);
  // of srun --mpi=pmi2 too, which sets the same values by its own names
  if (has("PMI_RANK") && has("PMI_SIZE") && !has("SLURM_STEP_ID")) return from_pmi(environment);
  if (has("SLURM_STEP_ID") && has("SLURM_PROCID") && has("SLURM_STEP_NUM_TASKS"))
    return from_slurm(environment);
  return {};
}

}  // namespace

Environment process_environment() {
  return [](const std::string& name) {
    const char* const value = std::getenv(name.c_str());
    return value ? std::optional<std::string>(value) : std::nullopt;
  };
}

Launch resolve_launch(const Environment& environment, const LaunchFlags& flags) {
  Launch out;
  if (flags.rank.has_value() != flags.world.has_value())
    throw UsageError(fmt::format("--dist-{} is given without --dist-{}",
                                 flags.rank ? "rank" : "world",
                                 flags.rank ? "world" : "rank"),
                     "give both");
  if (flags.rank) {
    require_below(*flags.rank, *flags.world, "--dist-rank", "--dist-world");
    out.rank = *flags.rank;
    out.world = *flags.world;
    out.launcher = "flags";
    out.local_rank = environment("LOCAL_RANK")
                         ? Variables(environment, "flags").number("LOCAL_RANK", 0, kMaxWorld)
                         : 0;
  } else {
    out = from_environment(environment);
  }
  if (!out.several()) return out;
  if (flags.store.find('/') != std::string::npos) {
    out.file = flags.store;
    out.hosted = false;
  } else if (!flags.store.empty()) {
    set_store(out, flags.store, "--dist-store");
    out.hosted = false;
  } else if (const auto host = environment("MASTER_ADDR"); host && environment("MASTER_PORT")) {
    set_store(out, *host + ":" + *environment("MASTER_PORT"), "MASTER_ADDR and MASTER_PORT");
  }
  if (out.hosted && out.host.empty())
    throw UsageError("torchrun's agent keeps the store, but MASTER_ADDR or MASTER_PORT is not set",
                     "let torchrun set them, or give --dist-store HOST:PORT");
  return out;
}

std::string Launch::describe() const {
  if (!several()) return "one process";
  return fmt::format("rank {} of {} (local {} of {}), by {}, meeting at {}",
                     rank,
                     world,
                     local_rank,
                     local_world,
                     launcher,
                     !file.empty()  ? "the address in " + printable(file)
                     : host.empty() ? "an address that rank 0 writes down"
                                    : fmt::format("{}:{}", host, port));
}

}  // namespace flux::dist
