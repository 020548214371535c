// tests/bench/dist_bench.cpp - how fast ranks move bytes, by the two operations that training uses.
//
//   dist_bench --dist-rank R --dist-world W --megabytes 64     # one process a rank; or torchrun, srun, mpirun
//
// Rank 0 prints bytes that each rank receives a second: gathering weights, and exchanging gradients, with the copies and sums
// that go with it.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <fmt/format.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/tool.h"
#include "common/dist/group.h"

namespace flux {
namespace {

ExitCode run(Tool& tool) {
  dist::LaunchFlags flags;
  int64_t megabytes = 64, repeats = 10;
  std::filesystem::path address = std::filesystem::temp_directory_path() / ".dist_bench.ranks";
  tool.flag("dist-rank", flags.rank, "R", "which rank this is", 0, 4096);
  tool.flag("dist-world", flags.world, "W", "how many there are", 1, 4096);
  tool.flag("dist-store", flags.store, "HOST:PORT", "where they meet");
  tool.flag("megabytes", megabytes, "N", "of one operation's tensor, in all", 1, 4096);
  tool.flag("repeats", repeats, "N", "operations, the first one not counted", 1, 1000);
  if (!tool.parse()) return ExitCode::kOk;
  const dist::Launch launch = dist::resolve_launch(dist::process_environment(), flags);
  if (!launch.several()) throw UsageError("dist_bench needs several ranks", "start two");
  const auto group = dist::Group::join(launch, address, {});
  const int64_t part = (megabytes << 20) / launch.world, bytes = part * launch.world;
  const at::Tensor all = at::zeros({bytes}, at::kByte);
  // of what each rank receives
  const auto rate = [&](const std::function<void()>& work) {
    work();
    group->barrier();
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < repeats; ++i) work();
    group->barrier();
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return static_cast<double>((bytes - part) * repeats) / seconds;
  };
  const double gather =
      rate([&] { group->all_gather(all, all.narrow(0, part * launch.rank, part)); });
  // as GradientExchange does it
  const at::Tensor gradients = at::zeros({bytes / 4}, at::kFloat);
  const double exchange = rate([&] {
    const at::Tensor sent = at::zeros_like(gradients), received = at::empty_like(gradients);
    sent.copy_(gradients);
    group->start_all_to_all(received, sent);
    group->wait();
    const at::Tensor rows = received.view({launch.world, -1});
    const at::Tensor sum = rows[0].clone();
    for (int64_t r = 1; r < launch.world; ++r) sum.add_(rows[r]);
  });
  if (launch.rank == 0)
    fmt::print(
        "{}\n",
        nlohmann::json{{"world", launch.world}, {"gather", gather}, {"exchange", exchange}}.dump());
  group->leave();
  return ExitCode::kOk;
}

}  // namespace
}  // namespace flux

int main(int argc, char** argv) { return flux::run_tool("dist_bench", argc, argv, flux::run); }
