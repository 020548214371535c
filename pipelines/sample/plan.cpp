#include "pipelines/sample/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "common/core/text.h"
#include "common/engine/budget.h"
#include "common/ops/op.h"

namespace flux::sample {
namespace {

std::string size_text(int64_t bytes) { return show_bytes(static_cast<uint64_t>(bytes)); }

/// By name, in the order of a table.
std::vector<std::pair<std::string, int64_t>> causes(const Choice& choice) {
  const bool cuda = choice.sampler.device.is_cuda();
  std::vector<std::pair<std::string, int64_t>> out;
  for (const MemoryCause cause : {MemoryCause::kWeights,
                                  MemoryCause::kRing,
                                  MemoryCause::kWorkingSet,
                                  MemoryCause::kKernelScratch,
                                  MemoryCause::kData,
                                  MemoryCause::kOther})
    out.emplace_back(memory_cause_name(cause), choice.plan.causes[static_cast<size_t>(cause)]);
  out.emplace_back("allocator", cuda ? engine::kCudaAllocator : 0);
  out.emplace_back("staging", cuda ? 0 : choice.plan.staging_bytes);
  out.emplace_back("fixed", cuda ? engine::kCudaContext : choice.fixed);
  return out;
}

std::vector<engine::WeightedAdapters> on_meta(std::span<const engine::WeightedAdapters> adapters) {
  std::vector<engine::WeightedAdapters> out(adapters.begin(), adapters.end());
  for (auto& of_file : out)
    for (lora::Module& module : of_file.adapters.modules)
      for (at::Tensor* part : module.parts())
        if (part->defined()) *part = part->to(at::kMeta);
  return out;
}

}  // namespace

Choice choose(const Options& options,
              const engine::ModelFile& file,
              const engine::SamplerOptions& wanted,
              std::span<const engine::WeightedAdapters> adapters,
              const engine::SampleShape& shape) {
  const dit::Config& config = file.config();
  const bool cuda = wanted.device.is_cuda();
  const auto budgets = engine::budgets(wanted.device, options.host_memory, options.device_memory);
  plan_kernels_for(wanted.device.type());
  const auto sizes = on_meta(adapters);
  const auto evaluate = [&](int64_t resident) {
    Choice c;
    c.sampler = wanted;
    c.sampler.resident_blocks = resident;
    c.plan = engine::plan_sampling(config, &file, c.sampler, sizes, shape);
    c.fixed = budgets.fixed;
    const int64_t device =
        c.plan.device_bytes() + (cuda ? engine::kCudaAllocator + engine::kCudaContext : 0);
    const int64_t host = budgets.fixed + c.plan.staging_bytes + c.plan.host_store_bytes +
                         (cuda ? 0 : c.plan.device_bytes());
    c.blocks_fit = cuda ? device <= budgets.device : host <= budgets.host;
    c.fits = c.blocks_fit && host <= budgets.host;
    const bool device_binds = cuda && (device > budgets.device || host <= budgets.host);
    c.needed = device_binds ? device : host;
    c.budget = device_binds ? budgets.device : budgets.host;
    c.budget_name = device_binds ? "--device-memory" : "--host-memory";
    return c;
  };
  const int64_t all = config.num_double_blocks + config.num_single_blocks;
  int64_t low = std::min(options.resident_blocks.value_or(0), all),
          high = std::min(options.resident_blocks.value_or(all), all);
  Choice best = evaluate(high);
  if (best.fits) return best;
  if (low < high) best = evaluate(low);
  // where blocks stay in a GPU's memory, fewer are kept in the host's
  while (best.blocks_fit && high - low > 1) {
    const int64_t middle = (low + high) / 2;
    Choice c = evaluate(middle);
    if (c.blocks_fit) {
      low = middle;
      best = std::move(c);
    } else {
      high = middle;
    }
  }
  if (best.fits) return best;
  best.hint = "give more " + best.budget_name;
  if (cuda && best.budget_name == "--host-memory" &&
      wanted.stream_from == engine::StreamFrom::kHost)
    best.hint += ", or --stream-from file";
  if (!wanted.base) best.hint += ", or use --base-precision fp8 or nf4";
  best.hint += shape.batch > 1 ? ", a smaller --size or --batch-size" : ", or a smaller --size";
  if (options.resident_blocks) best.hint += ", or leave --resident-blocks to the plan";
  return best;
}

std::string Choice::describe(int64_t num_blocks) const {
  return fmt::format("{} of {} ({}), tensors {}; {} of {} blocks stay in memory",
                     size_text(needed),
                     size_text(budget),
                     budget_name,
                     size_text(plan.device_bytes()),
                     sampler.resident_blocks,
                     num_blocks);
}

nlohmann::json Choice::object(int64_t num_blocks) const {
  nlohmann::json by_cause = nlohmann::json::object();
  for (const auto& [name, bytes] : causes(*this)) by_cause[name] = bytes;
  return {{"peak_bytes", needed},
          {"fits", fits},
          {"causes", by_cause},
          {"budget_bytes", budget},
          {"budget", budget_name},
          {"tensor_bytes", plan.device_bytes()},
          {"host_bytes", plan.host_store_bytes + plan.staging_bytes},
          {"settings",
           {{"resident_blocks", sampler.resident_blocks},
            {"num_blocks", num_blocks},
            {"ring_slots", sampler.lookahead + 1}}},
          {"step", {{"flops", plan.flops}, {"read_bytes", plan.read_bytes}}}};
}

std::string Choice::table(int64_t num_blocks) const {
  std::string out;
  for (const auto& [name, bytes] : causes(*this))
    if (bytes > 0) out += fmt::format("{:18} {:>12}\n", name, size_text(bytes));
  out += fmt::format("{:18} {:>12}\n", "peak", size_text(needed));
  out += fmt::format(
      "{:18} {:>12}  {}\n", budget_name, size_text(budget), fits ? "fits" : "does not fit");
  out += fmt::format("{} --resident-blocks {} --ring-slots {}  ({} blocks)\n",
                     fits ? "fastest that fits:" : "smallest there is:",
                     sampler.resident_blocks,
                     sampler.lookahead + 1,
                     num_blocks);
  if (!hint.empty()) out += "hint: " + hint + "\n";
  return out;
}

}  // namespace flux::sample
