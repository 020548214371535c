// common/engine/budget.h - what a process may take of the machine, and what it takes beside tensors.
#pragma once
#include <c10/core/Device.h>

#include <cstdint>

#include "common/models/flux/config.h"

namespace flux::engine {

/// Of a process beyond what it has before its first step: code of kernels, threads, the driver's tables. Measured
/// (docs/benchmarks.md).
inline constexpr int64_t kProcessGrowth = int64_t{48} << 20;
/// Of a GPU: context and modules; not measured, see docs/cuda.md.
inline constexpr int64_t kCudaContext = int64_t{500} << 20;
/// What LibTorch's allocator holds beyond live tensors with expandable segments: a 20 MiB page and a 2 MiB one.
inline constexpr int64_t kCudaAllocator = int64_t{22} << 20;

/// Bytes that the process has without a model: libraries, threads, and kProcessGrowth.
int64_t process_bytes_without_tensors();

struct Budgets {
  int64_t fixed = 0;   // process_bytes_without_tensors()
  int64_t host = 0;    // for all of the process
  int64_t device = 0;  // of a GPU; 0 on a CPU
};
/// 0 asks for 80 % of the memory that is free, 90 % of a GPU's.
Budgets budgets(c10::Device device, int64_t host_memory, int64_t device_memory);

/// Threads that wait for each other at the end of every small operation cost more than they save: a
/// model of 7 M parameters has its first loss 1.5 empty LibTorch starts after its own with one
/// thread, and 3 to 6 with two while other programs are busy.
void limit_threads(const dit::Config& config);

}  // namespace flux::engine
