#include "common/tensor/device.h"

#include <ATen/Context.h>
#include <dlfcn.h>
#include <fmt/format.h>
#include <torch/headeronly/version.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/core/tool.h"

namespace flux {
namespace {

const bool kVersionLine = add_version_line("LibTorch " TORCH_VERSION);

/// Asks the driver itself, since opening LibTorch's CUDA half takes a second and a gigabyte of
/// address space.
bool driver_has_gpu() {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!driver) return false;
  const auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  const auto count = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
  int devices = 0;
  return init && count && init(0) == 0 && count(&devices) == 0 && devices > 0;
}

std::filesystem::path cuda_library() {
  return std::filesystem::read_symlink("/proc/self/exe").parent_path().parent_path() / "lib" /
         "libflux_cuda.so";
}

/// Whether this build has it; a folder that cannot be searched has none.
bool has_cuda_library() {
  std::error_code ignored;
  return std::filesystem::exists(cuda_library(), ignored);
}

/// Opens the library and takes a GPU; throws ResourceError that says what is missing.
int64_t open_cuda(const LocalProcess& process) {
  const auto path = cuda_library();
  if (!has_cuda_library())
    throw ResourceError("--device cuda: this build has no " + show(path),
                        "install the CUDA toolkit (nvcc) and build again, or use --device cpu");
  if (!driver_has_gpu())
    throw ResourceError("--device cuda: the NVIDIA driver shows no GPU",
                        "check nvidia-smi, or use --device cpu");
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (!library)
    throw ResourceError("--device cuda: " + show(path) + " does not load: " + printable(dlerror()),
                        "install the NVIDIA libraries with scripts/setup --cuda");
  const auto devices = reinterpret_cast<int (*)()>(dlsym(library, "flux_cuda_device_count"));
  const auto use = reinterpret_cast<void (*)(int)>(dlsym(library, "flux_cuda_use"));
  if (!devices || !use || devices() == 0)
    throw ResourceError("--device cuda: LibTorch finds no GPU that it can use",
                        "check that the driver is new enough for CUDA 13, or use --device cpu");
  const int64_t gpu = choose_gpu(process, devices());
  use(static_cast<int>(gpu));
  // float32 means float32 here: TF32 keeps 10 bits of the mantissa
  at::globalContext().setAllowTF32CuBLAS(false);
  at::globalContext().setAllowTF32CuDNN(false);
  return gpu;
}

}  // namespace

void use_huge_pages() { setenv("THP_MEM_ALLOC_ENABLE", "1", /*overwrite=*/0); }

int64_t choose_gpu(const LocalProcess& process, int64_t num_gpus) {
  if (process.num <= num_gpus && process.number < num_gpus) return process.number;
  throw ResourceError(
      fmt::format(
          "--device cuda: {} processes on this machine, this is number {}, and {} {} for them",
          process.num,
          process.number,
          num_gpus,
          num_gpus == 1 ? "GPU" : "GPUs"),
      "start one process a GPU, and let each see all GPUs of the machine (CUDA_VISIBLE_DEVICES)");
}

c10::Device resolve_device(DeviceChoice choice, const LocalProcess& process) {
  if (choice == DeviceChoice::kCpu) return {c10::DeviceType::CPU};
  if (choice == DeviceChoice::kAuto && !(has_cuda_library() && driver_has_gpu()))
    return {c10::DeviceType::CPU};
  try {
    return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(open_cuda(process))};
  } catch (const ResourceError& error) {
    if (choice == DeviceChoice::kCuda) throw;
    log::warn("there is a GPU, but it is not used: {}", error.what());
    return {c10::DeviceType::CPU};
  }
}

int64_t device_free_bytes(const c10::Device& device) {
  const auto free_bytes =
      reinterpret_cast<int64_t (*)(int)>(dlsym(RTLD_DEFAULT, "flux_cuda_free_bytes"));
  if (!device.is_cuda() || !free_bytes)
    throw std::invalid_argument("free memory is known of a GPU in use only");
  return free_bytes(device.index());
}

const std::vector<std::pair<std::string, DeviceChoice>>& device_choices() {
  static const std::vector<std::pair<std::string, DeviceChoice>> choices{
      {"auto", DeviceChoice::kAuto}, {"cpu", DeviceChoice::kCpu}, {"cuda", DeviceChoice::kCuda}};
  return choices;
}

}  // namespace flux
