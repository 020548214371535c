// common/engine/sampler.h - a model that may be larger than memory and only samples, with any number of adapters.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "common/engine/block_loop.h"
#include "common/engine/choices.h"
#include "common/engine/model_blocks.h"
#include "common/models/flux/transformer.h"
#include "common/models/lora/lora.h"
#include "common/optim/optimizer.h"
#include "common/train/euler.h"

namespace flux::engine {

struct SamplerOptions {
  at::Device device = at::kCPU;
  at::ScalarType compute = at::kBFloat16;  // kFloat|kBFloat16
  std::optional<QuantFormat> base{};       // of the blocks' matrices
  int64_t resident_blocks = -1;            // the first blocks, whose weights stay; -1: all
  int64_t lookahead = 1;                   // streamed blocks read ahead: 1 to 3
  StreamFrom stream_from = StreamFrom::kFile;
  FileAccess access = kDefaultFileAccess;
};

/// An adapter and how much of it.
struct WeightedAdapters {
  lora::Adapters adapters;
  double weight = 1;
};

/// A model that only samples.
class Sampler {
 public:
  /// On Meta, without a file: a plan. Throws what ModelBlocks and lora::attach() throw.
  Sampler(const dit::Config& config,
          std::shared_ptr<ModelFile> file,
          const SamplerOptions& options,
          std::span<const WeightedAdapters> adapters);

  std::vector<at::Tensor> operator()(std::span<const dit::Inputs> inputs);
  ModelBlocks& model() { return model_; }

 private:
  std::unique_ptr<Optimizer> none_;  // nothing is trained
  ModelBlocks model_;
  BlockLoop loop_;
};

/// What the pictures of one batch are.
struct SampleShape {
  int64_t batch = 1;
  int64_t width = 0, height = 0;  // pixels, multiples of 16
  int64_t text_length = 512;
  bool text_mask = false, negative = false;
  at::ScalarType text_type = at::kBFloat16;
};

/// What sampling such a batch allocates, on Meta: two steps of it.
void sample_on_meta(const dit::Config& config, const Predict& predict, const SampleShape& shape);

}  // namespace flux::engine
