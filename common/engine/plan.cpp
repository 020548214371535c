#include "common/engine/plan.h"

#include <ATen/ops/empty.h>

#include <functional>
#include <numeric>
#include <optional>

#include "common/engine/record_layout.h"
#include "common/quant/scratch.h"

namespace flux::engine {
namespace {

at::Tensor meta(at::IntArrayRef shape, at::ScalarType type) {
  return at::empty(shape, at::TensorOptions().dtype(type).device(at::kMeta));
}

FlowInputs planned_batch(const dit::Config& config, const StepShape& s) {
  const int64_t rows = s.height / 8, columns = s.width / 8, channels = config.in_channels / 4;
  FlowInputs in;
  in.latents = meta({s.batch, channels, rows, columns}, at::kFloat);
  in.noise = meta({s.batch, channels, rows, columns}, at::kFloat);
  in.sigma = meta({s.batch}, at::kFloat);
  in.prompt_embedding = meta({s.batch, s.text_length, config.prompt_dim}, s.text_type);
  in.pooled_embedding = meta({s.batch, config.pooled_dim}, s.text_type);
  in.loss_weight = meta({s.batch}, at::kFloat);
  if (s.text_mask) in.text_mask = meta({s.batch, s.text_length}, at::kBool);
  if (s.input_noise) in.input_noise = meta({s.batch, channels, rows, columns}, at::kFloat);
  if (s.loss_mask) in.loss_mask = meta({s.batch, 1, rows, columns}, at::kFloat);
  return in;
}

/// Of a run of one block over a batch: products of the block's matrices, and attention.
struct BlockFlops {
  double linear = 0, attention = 0;
};

BlockFlops block_flops(const dit::Config& config, int64_t block, const StepShape& s) {
  const int64_t image = s.width / 16 * (s.height / 16), all = image + s.text_length;
  BlockFlops flops;
  const RecordLayout layout = block_layout(config, block, at::kBFloat16);
  for (const Slice& slice : layout.slices()) {
    if (slice.shape.size() != 2 || slice.name.find("mod") != std::string::npos) continue;
    const int64_t tokens = block >= config.num_double_blocks ? all
                           : slice.name.starts_with("img_")  ? image
                                                             : s.text_length;
    flops.linear += 2.0 * static_cast<double>(s.batch * tokens * slice.shape[0] * slice.shape[1]);
  }
  flops.attention = 4.0 * static_cast<double>(s.batch * all * all * config.hidden);
  return flops;
}

}  // namespace

int64_t MemoryPlan::device_bytes() const {
  return std::accumulate(causes.begin(), causes.end(), int64_t{0});
}

double step_flops(const dit::Config& config,
                  const TrainerOptions& options,
                  const StepShape& shape) {
  const int64_t num_blocks = config.num_double_blocks + config.num_single_blocks;
  const auto kept = blocks_with_kept_graph(num_blocks, options.residency, options.shares_weights());
  double sum = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const BlockFlops flops = block_flops(config, block, shape);
    const double runs = kept[static_cast<size_t>(block)] ? 1 : 2;
    // the flash backward makes the scores again and four products more
    sum += flops.linear * (runs + (options.full ? 2 : 1)) + flops.attention * (runs + 2.5);
  }
  return sum * static_cast<double>(shape.micro_batches);
}

namespace {

/// A trainer on Meta does `work` with `num_batches`, while others are held by the reader.
MemoryPlan plan_work(
    const dit::Config& config,
    const ModelFile* file,
    const TrainerOptions& options,
    const StepShape& shape,
    int64_t num_batches,
    const std::function<void(Trainer& trainer, std::span<const FlowInputs> batches)>& work) {
  TrainerOptions planned = options;
  planned.device = at::kMeta;
  planned.several_micro_batches = shape.micro_batches > 1;
  MemoryPlan plan;
  plan.flops = step_flops(config, options, shape);
  const int64_t before = meta_memory().live;
  int64_t on_host = 0;
  reset_meta_peak();
  {
    Trainer trainer(config, nullptr, planned);
    std::vector<FlowInputs> batches;
    {
      const MemoryScope scope(MemoryCause::kData);
      for (int64_t i = 0; i < num_batches + shape.batches_ahead; ++i)
        batches.push_back(planned_batch(config, shape));
    }
    work(trainer, std::span(batches).first(static_cast<size_t>(num_batches)));
    ModelBlocks& model = trainer.model();
    const auto traffic = model.bytes_per_step();
    plan.read_bytes = static_cast<double>(traffic.read);
    plan.written_bytes = static_cast<double>(traffic.written);
    plan.host_store_bytes = model.host_store_bytes();
    // of a GPU: what Meta counts and host memory holds
    if (options.device.is_cuda() && model.host_state_bytes() > 0) {
      on_host = model.host_state_bytes();
      plan.host_store_bytes += on_host + model.host_copy_bytes();
    }
    if (file && model.streams()) plan.staging_bytes = model.staging_bytes(*file, options.device);
  }
  // a run makes it once
  release_plain_weights(at::kMeta);
  plan.causes = meta_memory().causes;
  plan.causes[static_cast<size_t>(MemoryCause::kOther)] -= before;
  plan.causes[static_cast<size_t>(MemoryCause::kOptimizer)] -= on_host;
  return plan;
}

}  // namespace

MemoryPlan plan_memory(const dit::Config& config,
                       const ModelFile* file,
                       const TrainerOptions& options,
                       const StepShape& shape) {
  const auto work = [&](Trainer& trainer, std::span<const FlowInputs> batches) {
    // the second one has the updates that waited
    for (int64_t step = 1; step <= 2; ++step) trainer.step(batches, step, 1e-4);
    if (!shape.sample) return;
    sample_on_meta(
        config,
        [&](std::span<const dit::Inputs> inputs) { return trainer.predict(inputs); },
        *shape.sample);
  };
  return plan_work(config, file, options, shape, shape.micro_batches, work);
}

MemoryByCause evaluation_memory(const dit::Config& config,
                                const TrainerOptions& options,
                                const StepShape& shape,
                                int64_t num_batches) {
  const auto work = [](Trainer& trainer, std::span<const FlowInputs> batches) {
    trainer.evaluate(batches);
  };
  return plan_work(config, nullptr, options, shape, num_batches, work).causes;
}

MemoryPlan plan_sampling(const dit::Config& config,
                         const ModelFile* file,
                         const SamplerOptions& options,
                         std::span<const WeightedAdapters> adapters,
                         const SampleShape& shape) {
  SamplerOptions planned = options;
  planned.device = at::kMeta;
  MemoryPlan plan;
  const StepShape of_picture{
      .width = shape.width, .height = shape.height, .text_length = shape.text_length};
  const int64_t num_blocks = config.num_double_blocks + config.num_single_blocks;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const BlockFlops flops = block_flops(config, block, of_picture);
    plan.flops += flops.linear + flops.attention;
  }
  plan.flops *= static_cast<double>(shape.batch * (shape.negative ? 2 : 1));
  const int64_t before = meta_memory().live;
  reset_meta_peak();
  {
    Sampler sampler(config, nullptr, planned, adapters);
    sample_on_meta(
        config, [&](std::span<const dit::Inputs> inputs) { return sampler(inputs); }, shape);
    ModelBlocks& model = sampler.model();
    plan.read_bytes = static_cast<double>(model.bytes_per_step().read);
    plan.host_store_bytes = model.host_store_bytes();
    if (file && model.streams()) plan.staging_bytes = model.staging_bytes(*file, options.device);
  }
  release_plain_weights(at::kMeta);
  plan.causes = meta_memory().causes;
  plan.causes[static_cast<size_t>(MemoryCause::kOther)] -= before;
  return plan;
}

}  // namespace flux::engine
