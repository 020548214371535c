// common/engine/sampler.h - pictures' latents from noise: Euler steps along the velocities of a model that may be larger
// than memory, with any number of adapters.
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

namespace flux::engine {

/// The velocities [B, N, out_channels] of some inputs, on the device of the model.
using Predict = std::function<std::vector<at::Tensor>(std::span<const dit::Inputs> inputs)>;

/// One picture on its way.
struct SampleInputs {
  at::Tensor noise;             // [1, 16, h, w] float32
  at::Tensor prompt_embedding;  // [1, L, X]
  at::Tensor pooled_embedding;  // [1, V]
  at::Tensor text_mask{};       // [1, L] bool, or undefined
  at::Tensor
      negative_embedding{};  // the same of what the picture shall not be; undefined without CFG
  at::Tensor negative_pooled{};
  at::Tensor negative_mask{};
};

struct EulerOptions {
  std::vector<float> sigmas;  // from 1 to 0, see sampler_schedule()
  double guidance = 3.5;      // read by a model with guidance only
  /// velocity = negative + cfg_scale * (velocity - negative), where inputs have a negative.
  double cfg_scale = 1;
};

/// The latents of some pictures, [1, 16, h, w] float32 each. All pass through a block of the model while it is there; what one becomes does not depend
/// on the others, to the bit.
///   after_step  called with the number of steps done, from 1; may be empty
/// Source: Black Forest Labs' flux, sampling.py: denoise.
std::vector<at::Tensor> euler_sample(const Predict& predict,
                                     const EulerOptions& options,
                                     std::span<const SampleInputs> pictures,
                                     const std::function<void(int64_t)>& after_step = {});

/// Noise of a picture, [1, channels, h, w] float32: a stream of its own for each seed, prompt and index.
at::Tensor sample_noise(
    uint64_t seed, uint64_t prompt, uint64_t index, int64_t channels, int64_t h, int64_t w);

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
