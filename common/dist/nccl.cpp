#include "common/dist/nccl.h"

#include <dlfcn.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <cstdlib>

#include "common/core/error.h"

namespace flux::dist {
namespace {

template <typename Function>
Function* find(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

}  // namespace

c10::intrusive_ptr<c10d::Backend> nccl_backend(const BackendPlace& place) {
  require_nccl();
  c10::intrusive_ptr<c10d::Backend> out;
  find<MakeNcclBackend>(kMakeNcclBackend)(place, out);
  return out;
}

void require_nccl() {
  const char* const hint = "run scripts/setup, which fetches NCCL's headers, and build again";
  NcclFits* const fits = find<NcclFits>(kNcclFits);
  if (!fits)
    throw ResourceError("several ranks with --device cuda: libflux_cuda.so was built without NCCL",
                        hint);
  if (fits() == 0)
    throw ResourceError(
        "several ranks with --device cuda: libflux_cuda.so was built with another version of NCCL "
        "than LibTorch",
        hint);
}

void prepare_nccl() {
  // else its watchdog throws where nobody catches, and its monitor kills the process
  setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", 1);
  setenv("TORCH_NCCL_ENABLE_MONITORING", "0", 1);
  setenv("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0", 1);
  setenv("TORCH_NCCL_BLOCKING_WAIT", "0", 1);
}

}  // namespace flux::dist
