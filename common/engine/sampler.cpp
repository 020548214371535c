#include "common/engine/sampler.h"

#include <ATen/ops/empty.h>

#include "common/tensor/memory.h"

namespace flux::engine {
Sampler::Sampler(const dit::Config& config,
                 std::shared_ptr<ModelFile> file,
                 const SamplerOptions& options,
                 std::span<const WeightedAdapters> adapters)
    : none_(make_optimizer(SgdOptions{}, {})),
      model_(config,
             std::move(file),
             *none_,
             {.compute = options.compute,
              .base = options.base,
              .device = options.device,
              .resident_blocks = options.resident_blocks,
              .stream_from = options.stream_from,
              .lookahead = options.lookahead,
              .access = options.access}),
      loop_(config, model_, {.first_trained = model_.num_blocks()}) {
  for (const WeightedAdapters& of_file : adapters) model_.attach(of_file.adapters, of_file.weight);
}

std::vector<at::Tensor> Sampler::operator()(std::span<const dit::Inputs> inputs) {
  std::vector<MicroBatch> batches;
  for (const dit::Inputs& in : inputs)
    batches.push_back({in, [](const at::Tensor& velocity) { return velocity; }});
  return loop_.forward_only(batches);
}

void sample_on_meta(const dit::Config& config, const Predict& predict, const SampleShape& shape) {
  const auto meta = [](at::IntArrayRef sizes, at::ScalarType type) {
    return at::empty(sizes, at::TensorOptions().dtype(type).device(at::kMeta));
  };
  std::vector<SampleInputs> pictures;
  {
    const MemoryScope scope(MemoryCause::kData);
    for (int64_t i = 0; i < shape.batch; ++i) {
      SampleInputs p;
      p.noise = meta({1, config.in_channels / 4, shape.height / 8, shape.width / 8}, at::kFloat);
      p.prompt_embedding = meta({1, shape.text_length, config.prompt_dim}, shape.text_type);
      p.pooled_embedding = meta({1, config.pooled_dim}, shape.text_type);
      if (shape.text_mask) p.text_mask = meta({1, shape.text_length}, at::kBool);
      if (shape.negative) {
        p.negative_embedding = meta({1, shape.text_length, config.prompt_dim}, shape.text_type);
        p.negative_pooled = meta({1, config.pooled_dim}, shape.text_type);
        if (shape.text_mask) p.negative_mask = meta({1, shape.text_length}, at::kBool);
      }
      pictures.push_back(std::move(p));
    }
  }
  euler_sample(predict, {.sigmas = {1, 0.5F, 0}}, pictures);
}

}  // namespace flux::engine
