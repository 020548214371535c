// common/tensor/memory.h - counts the bytes that tensors hold, on the CPU and on Meta, by what they are for.
//
// One rule for both devices makes a plan comparable with a measurement: a tensor counts its bytes rounded up to
// kMemoryGranule. On Meta, where tensors have no bytes, the count is the plan.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "common/tensor/fwd.h"

namespace flux {

inline constexpr int64_t kMemoryGranule = 64;

/// What memory is held for.
enum class MemoryCause {
  kOther,        // embedders' results, the loss, what no scope names
  kWeights,      // weights that stay
  kRing,         // weights that come and go
  kBlockInputs,  // kept by the forward for the backward
  kWorkingSet,   // of the block at work: activations, its graph
  kGradients,
  kOptimizer,      // states of the optimizer
  kKernelScratch,  // inside one op
  kData,           // batches read ahead
};
inline constexpr size_t kNumMemoryCauses = 9;
/// "weights", "ring", "block_inputs", ...
std::string_view memory_cause_name(MemoryCause cause);

/// Tensors that this thread makes while the scope lives count under `cause`.
class MemoryScope {
 public:
  explicit MemoryScope(MemoryCause cause);
  ~MemoryScope();
  MemoryScope(const MemoryScope&) = delete;
  MemoryScope& operator=(const MemoryScope&) = delete;

 private:
  MemoryCause before_;
};

/// From now on the memory under `tensor` counts under `cause`. Does nothing for memory that is not counted.
void count_as(const at::Tensor& tensor, MemoryCause cause);

/// Bytes by cause.
using MemoryByCause = std::array<int64_t, kNumMemoryCauses>;

struct MemoryUse {
  int64_t live = 0, peak = 0;  // bytes now, and at most since the last reset
  MemoryByCause causes{};      // of `peak`
};

/// Puts counting allocators under LibTorch's CPU and Meta tensors. Call it once in a program, before the first tensor
/// is made and before threads start; a second call does nothing.
///
/// The CPU allocator keeps freed memory of 128 KiB and more for the next tensor of the same size, as long as what it keeps and
/// what is live do not exceed the highest peak so far: a step that repeats its sizes maps no page twice, and the process
/// never holds more than its peak.
void count_tensor_memory();
/// Whether count_tensor_memory() was called.
bool counts_tensor_memory();

MemoryUse cpu_memory();
MemoryUse meta_memory();
/// The peaks become what is live now.
void reset_cpu_peak();
void reset_meta_peak();
/// Gives back what the CPU allocator keeps for later.
void release_cached_memory();

/// Counts memory that is no tensor's (an arena, a scratch buffer) as if a CPU tensor held it.
class CountedMemory {
 public:
  CountedMemory() = default;
  CountedMemory(int64_t bytes, MemoryCause cause);
  ~CountedMemory();
  CountedMemory(CountedMemory&& other) noexcept;
  CountedMemory& operator=(CountedMemory&& other) noexcept;

 private:
  int64_t bytes_ = 0;
  MemoryCause cause_ = MemoryCause::kOther;
};

}  // namespace flux
