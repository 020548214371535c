// common/engine/plan.h - how much memory a run will take, and the fastest setting that fits.
//
// The plan of a setting is the run itself on the Meta device, where tensors have sizes and no bytes: the same Trainer, the
// same loop, the same ops. What is not a tensor's (the process itself, threads' staging) is added as named constants.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "common/engine/sampler.h"
#include "common/engine/trainer.h"
#include "common/tensor/memory.h"

namespace flux::engine {

/// What one step reads.
struct StepShape {
  int64_t batch = 1, micro_batches = 1;
  int64_t width = 0, height = 0;  // of the largest pictures, in pixels; multiples of 16
  int64_t text_length = 512;
  bool text_mask = false, loss_mask = false, input_noise = false;
  at::ScalarType text_type = at::kBFloat16;  // of the cached embeddings
  int64_t batches_ahead = 0;                 // held by the reader
  std::optional<SampleShape> sample{};       // pictures that are made between steps
};

struct MemoryPlan {
  MemoryByCause causes{};     // tensors and arenas on the device when they are most
  int64_t staging_bytes = 0;  // host memory through which weights stream
  int64_t host_store_bytes =
      0;             // weights that stream from host memory (beside those on the device)
  double flops = 0;  // of a step
  double read_bytes = 0, written_bytes = 0;  // between the store and the ring, a step
  /// Of tensors and arenas on the device.
  int64_t device_bytes() const;
};

/// Throws as Trainer does. Needs count_tensor_memory(). `options.device` is the real one; nothing is allocated there.
///   file  for what reading it takes; may be null
MemoryPlan plan_memory(const dit::Config& config,
                       const ModelFile* file,
                       const TrainerOptions& options,
                       const StepShape& shape);

/// The most that evaluating `num_batches` of the shape together takes (Trainer::evaluate), with what training keeps meanwhile.
MemoryByCause evaluation_memory(const dit::Config& config,
                                const TrainerOptions& options,
                                const StepShape& shape,
                                int64_t num_batches);

/// plan_memory() of sampling a batch of pictures, one step of which is what `flops` and bytes are of. Throws as Sampler does.
///   adapters  on Meta, for their sizes
MemoryPlan plan_sampling(const dit::Config& config,
                         const ModelFile* file,
                         const SamplerOptions& options,
                         std::span<const WeightedAdapters> adapters,
                         const SampleShape& shape);

/// Floating-point operations of a step's matrix products and attention; a multiplication and an addition are two.
///   rerun  blocks that are run twice
double step_flops(const dit::Config& config, const TrainerOptions& options, const StepShape& shape);

}  // namespace flux::engine
