// tests/bench/step_bench.cpp - one training step of a model file, without caches: seconds, plan and peak.
//
//   step_bench --model flux.safetensors --method lora --resolution 512x512 --precision bf16 --steps 2
//   torchrun --standalone --nproc-per-node 2 --no-python step_bench ... --method full      # or --dist-rank, --dist-world
//
// Inputs are random. Every line is one step; the last is a JSON object for scripts. Residency is the plan's, within
// --host-memory, unless given.
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <fmt/format.h>

#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/engine/plan.h"
#include "common/engine/trainer.h"
#include "common/tensor/memory.h"
#include "pipelines/train/load.h"
#include "pipelines/train/options.h"
#include "pipelines/train/plan.h"
#include "pipelines/train/ranks.h"
#include "tests/support/random_batch.h"

namespace flux {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

ExitCode run(Tool& tool) {
  train::Options o;
  train::add_flags(o, tool);
  int64_t steps = 2;
  tool.flag("steps", steps, "N", "steps to run", 1, 1000);
  if (!tool.parse()) return ExitCode::kOk;
  if (o.scratch.empty()) o.scratch = std::filesystem::temp_directory_path();
  o.launch = dist::resolve_launch(dist::process_environment(), o.dist);
  o.out = o.scratch / "step_bench";  // ranks meet beside it
  count_tensor_memory();
  const at::Device device(at::kCPU);
  engine::TrainerOptions wanted = train::trainer_options(
      o, device, o.precision == train::Precision::kBF16 ? at::kBFloat16 : at::kFloat);
  engine::ModelFileOptions read;
  read.dtype = wanted.compute;
  read.quant = wanted.base;
  const auto file = std::make_shared<engine::ModelFile>(o.model, read);
  wanted.base = file->quant();
  engine::StepShape shape;
  shape.batch = std::max<int64_t>(1, o.batch_size);
  shape.micro_batches = o.gradient_accumulation;
  shape.width = o.plan_width;
  shape.height = o.plan_height;
  shape.text_length = o.plan_t5_length;

  const double begin = seconds();
  const auto choice = train::choose(o, file->config(), file.get(), wanted, shape);
  const double planned = seconds();
  fmt::print("plan: {} ({:.2f} s)\n", choice.describe(), planned - begin);
  if (!choice.fits) throw ResourceError("does not fit", choice.hint);
  wanted.residency = choice.residency;
  const auto group = train::join_ranks(o);
  train::GroupParts parts;
  if (group) parts = train::join_parts(*group, wanted.ranks);
  engine::Trainer trainer(file->config(), file, wanted);
  fmt::print("loaded in {:.2f} s\n", seconds() - planned);
  std::vector<FlowInputs> batches;
  for (int64_t i = 0; i < shape.micro_batches; ++i)
    batches.push_back(test::random_batch(file->config(), shape));
  const std::vector<int64_t> sizes(static_cast<size_t>(o.batches_a_step()), shape.batch);
  double last = 0;
  nlohmann::json losses = nlohmann::json::array();
  for (int64_t step = 1; step <= steps; ++step) {
    const double start = seconds();
    const auto before = trainer.model().ring_counts();
    const auto result = trainer.step(batches, step, 1e-4, sizes);
    const auto after = trainer.model().ring_counts();
    last = seconds() - start;
    losses.push_back(result.loss);
    fmt::print(
        "step {}: loss {:.4f} in {:.2f} s, {:.1f} GFLOP/s; read {} and wrote {}, waited {:.2f} s; "
        "tensors {}, process {}\n",
        step,
        result.loss,
        last,
        choice.plan.flops / last * 1e-9,
        show_bytes(static_cast<uint64_t>(after.bytes_read - before.bytes_read)),
        show_bytes(static_cast<uint64_t>(after.bytes_written - before.bytes_written)),
        after.waited_seconds - before.waited_seconds,
        show_bytes(static_cast<uint64_t>(cpu_memory().peak)),
        show_bytes(peak_rss_bytes()));
    std::fflush(stdout);
  }
  const auto by_cause = [](const MemoryByCause& causes) {
    nlohmann::json out;
    for (size_t i = 0; i < causes.size(); ++i)
      out[std::string(memory_cause_name(static_cast<MemoryCause>(i)))] = causes[i];
    return out;
  };
  const nlohmann::json object{{"seconds", last},
                              {"losses", losses},
                              {"rank", o.launch.rank},
                              {"world", o.launch.world},
                              {"flops", choice.plan.flops},
                              {"planned_bytes", choice.needed},
                              {"planned_tensor_bytes", choice.plan.device_bytes()},
                              {"tensor_bytes", cpu_memory().peak},
                              {"planned_causes", by_cause(choice.plan.causes)},
                              {"causes", by_cause(cpu_memory().causes)},
                              {"peak_rss_bytes", peak_rss_bytes()}};
  fmt::print("{}\n", object.dump());
  if (group) group->leave();
  return ExitCode::kOk;
}

}  // namespace
}  // namespace flux

int main(int argc, char** argv) { return flux::run_tool("step_bench", argc, argv, flux::run); }
