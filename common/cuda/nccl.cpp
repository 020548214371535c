// common/cuda/nccl.cpp - the only file that sees NCCL's header.
#include "common/dist/nccl.h"

#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include <cstddef>
#include <new>
#include <type_traits>

/// See kNcclFits. LibTorch's constructor writes an ncclConfig_t with the size that it has there.
extern "C" int flux_cuda_nccl_fits() {
  static_assert(std::is_same_v<decltype(flux_cuda_nccl_fits), flux::dist::NcclFits>);
  using Options = c10d::ProcessGroupNCCL::Options;
  alignas(Options) static std::byte room[sizeof(Options) + 4096];  // it may be larger there
  return (new (room) Options(false))->config.size == sizeof(ncclConfig_t);
}

/// See kMakeNcclBackend.
extern "C" void flux_cuda_make_nccl_backend(const flux::dist::BackendPlace& place,
                                            c10::intrusive_ptr<c10d::Backend>& out) {
  static_assert(std::is_same_v<decltype(flux_cuda_make_nccl_backend), flux::dist::MakeNcclBackend>);
  const c10::cuda::CUDAGuard guard(place.device);
  // what the ranks wait for shall not wait behind what they compute
  auto options = c10d::ProcessGroupNCCL::Options::create(/*is_high_priority_stream=*/true);
  options->timeout = place.operation;
  out = c10::make_intrusive<c10d::ProcessGroupNCCL>(
      place.store, static_cast<int>(place.rank), static_cast<int>(place.world), options);
}
