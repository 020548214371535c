// common/tensor/device.h - `--device auto|cpu|cuda`, and the CUDA library that is opened only when
// asked for.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "common/tensor/fwd.h"  // c10::Device by name: a program's main sees no torch header

namespace flux {

enum class DeviceChoice { kAuto, kCpu, kCuda };

/// What to compute on. Call it once, before the first use of a tensor: kernels for CUDA live in
/// libflux_cuda.so (in ../lib beside the program's folder), and LibTorch takes them only before it
/// was asked whether there is a GPU.
///
///   kCpu   nothing is opened
///   kAuto  cuda:0 where the library, its NVIDIA libraries and a GPU are there, else the CPU
///   kCuda  throws ResourceError naming what is missing: the library, the NVIDIA libraries, or a
///   GPU
c10::Device resolve_device(DeviceChoice choice);

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
