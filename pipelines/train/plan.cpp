#include "pipelines/train/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "common/engine/budget.h"
#include "common/ops/op.h"
#include "pipelines/train/load.h"
#include "pipelines/train/run.h"

namespace flux::train {
namespace {

using engine::Residency;

using engine::kCudaAllocator;
using engine::kCudaContext;

/// Rates that settings are compared by; only their ratio matters.
struct Rates {
  double flops, bytes;
};
Rates rates(const engine::TrainerOptions& o) {
  if (o.device.is_cuda())
    return {1.5e14, o.residency.stream_from == engine::StreamFrom::kHost ? 2.5e10 : 2e9};
  return {o.compute == at::kBFloat16 ? 1e12 : 3e11, 1e9};
}

/// One setting and what it needs.
struct Candidate {
  Residency residency;
  engine::MemoryPlan plan;
  int64_t device = 0, host = 0;  // bytes needed of each budget; on a CPU all is host
  bool fits = false;
  /// Of the memory that blocks stay in: less is left the more stay. On a GPU, host memory is the other way round.
  bool fits_where_blocks_stay = false;
  double seconds = 0;
};

class Planner {
 public:
  Planner(const Options& options,
          const dit::Config& config,
          const engine::ModelFile* file,
          const engine::TrainerOptions& wanted,
          const engine::StepShape& shape)
      : options_(options), config_(config), file_(file), wanted_(wanted), shape_(shape) {
    const auto budgets = engine::budgets(wanted.device, options.host_memory, options.device_memory);
    fixed_ = budgets.fixed;
    // of the machine's free memory each of its ranks takes a share
    const int64_t sharing = options.host_memory > 0 ? 1 : options.launch.local_world;
    host_budget_ = budgets.host / sharing;
    device_budget_ = budgets.device;
    plan_kernels_for(wanted.device.type());
  }

  Choice best() {
    Choice choice;
    stream_adapters_ = wanted_.residency.stream_adapters;
    stream_states_ = wanted_.residency.stream_states;
    Candidate found = search();
    // the states alone are half of what trained blocks take, or more
    if (wanted_.full && !stream_states_ &&
        (!found.fits || found.residency.resident_blocks < num_blocks())) {
      stream_states_ = true;
      Candidate other = search();
      if (other.fits && (!found.fits || other.seconds < found.seconds)) found = std::move(other);
    }
    if (!found.fits && !wanted_.full && !stream_adapters_) {
      stream_adapters_ = true;
      found = search();
    }
    choice.residency = found.residency;
    choice.plan = found.plan;
    choice.fixed = fixed_;
    choice.fits = found.fits;
    const bool device_binds =
        is_cuda() && (found.device > device_budget_ || found.host <= host_budget_);
    choice.needed = device_binds ? found.device : found.host;
    choice.budget = device_binds ? device_budget_ : host_budget_;
    choice.budget_name = device_binds ? "--device-memory" : "--host-memory";
    if (!found.fits) choice.hint = hint(device_binds);
    return choice;
  }

 private:
  bool is_cuda() const { return wanted_.device.is_cuda(); }
  int64_t num_blocks() const { return config_.num_double_blocks + config_.num_single_blocks; }

  Candidate evaluate(int64_t resident, int64_t kept, engine::InputPlace inputs) const {
    Candidate c;
    engine::TrainerOptions o = wanted_;
    o.residency.stream_adapters = stream_adapters_;
    o.residency.stream_states = stream_states_;
    o.residency.resident_blocks = resident;
    o.residency.kept_graphs = kept;
    o.residency.inputs = inputs;
    c.residency = o.residency;
    c.plan = engine::plan_memory(config_, file_, o, shape_);
    if (is_cuda()) {
      c.device = c.plan.device_bytes() + kCudaAllocator + kCudaContext;
      c.host = fixed_ + c.plan.staging_bytes + c.plan.host_store_bytes;
    } else {
      c.host = fixed_ + c.plan.device_bytes() + c.plan.staging_bytes + c.plan.host_store_bytes;
    }
    c.fits_where_blocks_stay = is_cuda() ? c.device <= device_budget_ : c.host <= host_budget_;
    c.fits = c.fits_where_blocks_stay && c.host <= host_budget_;
    const Rates r = rates(o);
    const double computing = c.plan.flops / r.flops,
                 copying = (c.plan.read_bytes + c.plan.written_bytes) / r.bytes;
    // at the same time; what copies on a CPU is its cores
    c.seconds =
        std::max(computing, copying) + std::min(computing, copying) * (is_cuda() ? 0.01 : 0.25);
    return c;
  }

  /// The largest number in [low, high] whose candidate fits where blocks stay, if `low` does.
  static std::optional<Candidate> largest(int64_t low,
                                          int64_t high,
                                          const std::function<Candidate(int64_t)>& of) {
    Candidate best = of(high);
    if (best.fits_where_blocks_stay) return best;
    if (low == high || !(best = of(low)).fits_where_blocks_stay) return std::nullopt;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      Candidate c = of(middle);
      if (c.fits_where_blocks_stay) {
        low = middle;
        best = std::move(c);
      } else {
        high = middle;
      }
    }
    return best;
  }

  /// How many graphs can be kept: streamed blocks stay in the ring for it.
  int64_t most_graphs(int64_t resident) const {
    if (wanted_.shares_weights()) resident = 0;
    return std::min(num_blocks(), resident + wanted_.residency.lookahead + 1);
  }

  /// With as many kept graphs as fit.
  std::optional<Candidate> with_graphs(int64_t resident, engine::InputPlace inputs) const {
    if (options_.kept_graphs) {
      Candidate c = evaluate(resident, *options_.kept_graphs, inputs);
      return c.fits ? std::optional(std::move(c)) : std::nullopt;
    }
    return largest(
        0, most_graphs(resident), [&](int64_t kept) { return evaluate(resident, kept, inputs); });
  }

  Candidate search() const {
    const int64_t all = num_blocks();
    std::vector<engine::InputPlace> places{
        engine::InputPlace::kDevice,
        is_cuda() ? engine::InputPlace::kHost : engine::InputPlace::kDisk};
    if (options_.block_inputs) places = {*options_.block_inputs};
    const int64_t low = std::min(options_.resident_blocks.value_or(0), all),
                  high = std::min(options_.resident_blocks.value_or(all), all);
    const int64_t kept = options_.kept_graphs.value_or(0);
    std::optional<Candidate> too_much_on_host;
    for (const auto place : places) {
      if (auto all_there = with_graphs(high, place); all_there && all_there->fits)
        return *all_there;
      auto most = largest(low, high, [&](int64_t n) { return evaluate(n, kept, place); });
      if (!most) continue;
      if (!most->fits) {
        too_much_on_host = std::move(most);
        continue;
      }
      // memory may save reading weights or running blocks again
      Candidate best = *most;
      const int64_t resident = most->residency.resident_blocks;
      for (const int64_t n : std::set{resident, resident * 3 / 4, resident / 2}) {
        if (n < low) continue;
        const auto c = with_graphs(n, place);
        if (c && c->fits && c->seconds < best.seconds) best = *c;
      }
      return best;
    }
    return too_much_on_host ? *too_much_on_host : evaluate(low, kept, places.back());
  }

  std::string hint(bool device_binds) const {
    std::string what = device_binds ? "give more --device-memory" : "give more --host-memory";
    if (is_cuda() && !device_binds && wanted_.residency.stream_from == engine::StreamFrom::kHost)
      what += ", or --stream-from file";
    if (wanted_.full && wanted_.clip == engine::ClipMode::kGlobal)
      what += ", or use --clip per-parameter, for which no gradients wait";
    if (!wanted_.full && !wanted_.base) what += ", or use --base-precision fp8 or nf4";
    return what + ", a smaller resolution or batch" +
           (options_.resident_blocks || options_.kept_graphs || options_.block_inputs
                ? ", or leave --resident-blocks, --keep-graphs and --block-inputs to the plan"
                : "");
  }

  const Options& options_;
  const dit::Config& config_;
  const engine::ModelFile* file_;
  const engine::TrainerOptions& wanted_;
  const engine::StepShape& shape_;
  int64_t fixed_ = 0, host_budget_ = 0, device_budget_ = 0;
  bool stream_adapters_ = false, stream_states_ = false;
};

/// By name, in the order of a table.
std::vector<std::pair<std::string, int64_t>> causes(const Choice& choice, bool cuda) {
  std::vector<std::pair<std::string, int64_t>> out;
  for (const MemoryCause cause : {MemoryCause::kWeights,
                                  MemoryCause::kRing,
                                  MemoryCause::kBlockInputs,
                                  MemoryCause::kWorkingSet,
                                  MemoryCause::kGradients,
                                  MemoryCause::kOptimizer,
                                  MemoryCause::kKernelScratch,
                                  MemoryCause::kData,
                                  MemoryCause::kOther})
    out.emplace_back(memory_cause_name(cause), choice.plan.causes[static_cast<size_t>(cause)]);
  out.emplace_back("allocator", cuda ? kCudaAllocator : 0);
  out.emplace_back("staging", cuda ? 0 : choice.plan.staging_bytes);
  out.emplace_back("fixed", cuda ? kCudaContext : choice.fixed);
  return out;
}

nlohmann::json object(const Choice& choice, int64_t num_blocks, bool cuda) {
  nlohmann::json by_cause = nlohmann::json::object();
  std::string limit;
  int64_t most = -1;
  for (const auto& [name, bytes] : causes(choice, cuda)) {
    by_cause[name] = bytes;
    if (bytes > most) {
      most = bytes;
      limit = name;
    }
  }
  const Residency& r = choice.residency;
  return {{"peak_bytes", choice.needed},
          {"fits", choice.fits},
          {"causes", by_cause},
          {"limit", limit},
          {"budget_bytes", choice.budget},
          {"budget", choice.budget_name},
          {"tensor_bytes", choice.plan.device_bytes()},
          {"host_bytes", choice.plan.host_store_bytes + choice.plan.staging_bytes},
          {"settings",
           {{"resident_blocks", r.resident_blocks},
            {"num_blocks", num_blocks},
            {"keep_graphs", r.kept_graphs},
            {"ring_slots", r.lookahead + 1},
            {"stream_adapters", r.stream_adapters},
            {"stream_states", r.stream_states},
            {"block_inputs", block_inputs_word(r.inputs)}}},
          {"step",
           {{"flops", choice.plan.flops},
            {"read_bytes", choice.plan.read_bytes},
            {"written_bytes", choice.plan.written_bytes}}}};
}

std::string table(const Choice& choice, int64_t num_blocks, bool cuda) {
  std::string out;
  for (const auto& [name, bytes] : causes(choice, cuda))
    if (bytes > 0)
      out += fmt::format("{:18} {:>12}\n", name, show_bytes(static_cast<uint64_t>(bytes)));
  out += fmt::format("{:18} {:>12}\n", "peak", show_bytes(static_cast<uint64_t>(choice.needed)));
  out += fmt::format("{:18} {:>12}  {}\n",
                     choice.budget_name,
                     show_bytes(static_cast<uint64_t>(choice.budget)),
                     choice.fits ? "fits" : "does not fit");
  const Residency& r = choice.residency;
  out += fmt::format(
      "{} --resident-blocks {} --keep-graphs {} --ring-slots {} --block-inputs {}{}{}  ({} "
      "blocks)\n",
      choice.fits ? "fastest that fits:" : "smallest there is:",
      r.resident_blocks,
      r.kept_graphs,
      r.lookahead + 1,
      block_inputs_word(r.inputs),
      r.stream_adapters ? " --stream-adapters" : "",
      r.stream_states ? " --stream-states" : "",
      num_blocks);
  if (!choice.hint.empty()) out += "hint: " + choice.hint + "\n";
  return out;
}

}  // namespace

std::string Choice::describe() const {
  return fmt::format("{} of {} ({}), tensors {}; {} blocks stay in memory, {} keep their graph",
                     show_bytes(static_cast<uint64_t>(needed)),
                     show_bytes(static_cast<uint64_t>(budget)),
                     budget_name,
                     show_bytes(static_cast<uint64_t>(plan.device_bytes())),
                     residency.resident_blocks,
                     residency.kept_graphs);
}

void require_fit(const Options& options, const Choice& choice) {
  if (choice.fits) return;
  throw ResourceError(fmt::format("{} would take {}, {} may take {}",
                                  show(options.model),
                                  show_bytes(static_cast<uint64_t>(choice.needed)),
                                  choice.budget_name,
                                  show_bytes(static_cast<uint64_t>(choice.budget))),
                      choice.hint);
}

Choice choose(const Options& options,
              const dit::Config& config,
              const engine::ModelFile* file,
              const engine::TrainerOptions& wanted,
              const engine::StepShape& shape) {
  return Planner(options, config, file, wanted, shape).best();
}

ExitCode run_plan(const Options& options) {
  count_tensor_memory();
  // no GPU is needed to plan for one
  const bool cuda = options.device == DeviceChoice::kCuda;
  const at::Device device(cuda ? at::kCUDA : at::kCPU);
  if (cuda && options.device_memory == 0)
    throw UsageError("--plan --device cuda needs --device-memory",
                     "give the GPU's memory, 24GiB for one");
  const bool bf16 =
      options.precision == Precision::kBF16 || (options.precision == Precision::kAuto && cuda);
  engine::TrainerOptions wanted =
      trainer_options(options, device, bf16 ? at::kBFloat16 : at::kFloat);
  engine::ModelFileOptions read;
  read.dtype = wanted.compute;
  read.quant = wanted.base;
  const engine::ModelFile file(options.model, read);
  require_trainable(options, file);
  wanted.base = file.quant();
  engine::StepShape shape;
  shape.batch = std::max<int64_t>(1, options.batch_size);
  shape.micro_batches = options.gradient_accumulation;
  shape.width = options.plan_width;
  shape.height = options.plan_height;
  shape.text_length = options.plan_t5_length;
  shape.text_mask = options.text_mask == TextMask::kOn;
  shape.loss_mask =
      options.masked_loss == MaskedLoss::kOn || options.masked_loss == MaskedLoss::kRenormalised;
  shape.input_noise = options.ip_noise_gamma > 0;
  const Choice choice = choose(options, file.config(), &file, wanted, shape);
  const int64_t blocks = file.num_records();
  if (options.plan == PlanOutput::kJson)
    std::printf("%s\n", object(choice, blocks, cuda).dump().c_str());
  else
    std::fputs(table(choice, blocks, cuda).c_str(), stdout);
  return choice.fits ? ExitCode::kOk : ExitCode::kResource;
}

}  // namespace flux::train
