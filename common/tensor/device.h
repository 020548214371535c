// common/tensor/device.h - `--device auto|cpu|cuda`, and the CUDA library that is opened only when
// asked for.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/tensor/fwd.h"  // c10::Device by name: a program's main sees no torch header

namespace flux {

enum class DeviceChoice { kAuto, kCpu, kCuda };

/// Which of the processes of one run on this machine; each takes a GPU of its own.
struct LocalProcess {
  int64_t number = 0, num = 1;
};

/// The index of the process's GPU among those that it sees. Throws ResourceError that says both numbers: there are fewer
/// GPUs than processes.
int64_t choose_gpu(const LocalProcess& process, int64_t num_gpus);

/// What to compute on. Call it once, before the first use of a tensor: kernels for CUDA live in
/// libflux_cuda.so (in ../lib beside the program's folder), and LibTorch takes them only before it
/// was asked whether there is a GPU.
///
///   kCpu   nothing is opened
///   kAuto  the process's GPU where the library, its NVIDIA libraries and a GPU for each process are
///          there, else the CPU
///   kCuda  throws ResourceError naming what is missing: the library, the NVIDIA libraries, or a
///          GPU
///
/// The GPU becomes the current one of the calling thread.
c10::Device resolve_device(DeviceChoice choice, const LocalProcess& process = {});

/// Asks LibTorch to put tensors of 2 MiB and more on huge pages; does nothing where the system has
/// none, or where the user has set THP_MEM_ALLOC_ENABLE. Call it before the first tensor is made.
/// For programs whose large tensors live shortly: encoding images takes 1.3 times the time without
/// it, since each tensor's pages are mapped one by one (docs/benchmarks.md).
void use_huge_pages();

/// Memory of a GPU that nobody has taken yet. Throws std::invalid_argument for another device.
int64_t device_free_bytes(const c10::Device& device);

/// The words of the flag, for Tool::flag.
const std::vector<std::pair<std::string, DeviceChoice>>& device_choices();

}  // namespace flux
