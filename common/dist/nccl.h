// common/dist/nccl.h - what moves tensors between GPUs: LibTorch's NCCL backend, made by libflux_cuda.so.
#pragma once
#include <c10/core/Device.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <cstdint>

namespace c10d {
class Backend;
}  // namespace c10d

namespace flux::dist {

/// Where a rank stands in a group.
struct BackendPlace {
  c10::intrusive_ptr<c10d::Store> store{};  // keys of its own
  int64_t rank = 0, world = 1;
  c10::Device device;
  std::chrono::seconds operation{};  // what one may take
};

/// What libflux_cuda.so exports by that name if it was built with NCCL. By reference: a function of C returns no class.
/// Throws what LibTorch throws.
inline constexpr const char* kMakeNcclBackend = "flux_cuda_make_nccl_backend";
using MakeNcclBackend = void(const BackendPlace& place, c10::intrusive_ptr<c10d::Backend>& out);
/// Whether it was built with the header of LibTorch's NCCL, which decides the layout of what they share.
inline constexpr const char* kNcclFits = "flux_cuda_nccl_fits";
using NcclFits = int();

/// Throws ResourceError: the library is not open (see resolve_device()), or was built without NCCL.
c10::intrusive_ptr<c10d::Backend> nccl_backend(const BackendPlace& place);
/// Throws the same, before anything is loaded.
void require_nccl();

/// Asks LibTorch's NCCL to report failures and not to end the process: the ranks have their own way to end. By the
/// environment, so call it before there are threads.
void prepare_nccl();

}  // namespace flux::dist
