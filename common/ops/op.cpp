#include "common/ops/op.h"

#include <atomic>

namespace flux {
namespace {

std::atomic<c10::DeviceType> planned = c10::kCPU;

}  // namespace

void plan_kernels_for(c10::DeviceType device) { planned = device; }
c10::DeviceType kernel_device(const at::Tensor& tensor) {
  return tensor.is_meta() ? planned.load() : tensor.device().type();
}

}  // namespace flux
