#include "common/quant/scratch.h"

#include <ATen/ops/empty.h>

#include <map>

#include "common/tensor/memory.h"

namespace flux {
namespace {

struct Scratch {
  std::mutex lock;
  at::Tensor bytes;

  void grow(const at::Device& device, int64_t num_bytes) {
    if (bytes.defined() && bytes.numel() >= num_bytes) return;
    bytes = at::Tensor();  // before the new one is there, so that both never are
    const MemoryScope scope(MemoryCause::kKernelScratch);
    bytes = at::empty({num_bytes}, at::device(device).dtype(at::kByte));
  }
};

Scratch& scratch_of(const at::Device& device) {
  // never destroyed: a GPU's allocator may be gone by then
  static auto* lock = new std::mutex;
  static auto* all = new std::map<std::pair<c10::DeviceType, c10::DeviceIndex>, Scratch>;
  const std::lock_guard guard(*lock);
  return (*all)[{device.type(), device.index()}];
}

}  // namespace

PlainWeight::PlainWeight(const QuantizedWeight& weight, c10::ScalarType type) {
  const at::Device device = weight.scales.device();
  Scratch& scratch = scratch_of(device);
  lock_ = std::unique_lock(scratch.lock);
  const int64_t num_bytes = plain_weight_bytes(weight.out(), weight.in(), type);
  scratch.grow(device, num_bytes);
  // detached: a change of its contents is none of a saved tensor's
  plain_ =
      scratch.bytes.detach().narrow(0, 0, num_bytes).view(type).view({weight.out(), weight.in()});
  dequantize_into(weight, plain_);
}

int64_t plain_weight_bytes(int64_t out, int64_t in, c10::ScalarType type) {
  return out * in * static_cast<int64_t>(c10::elementSize(type));
}

void reserve_plain_weights(const at::Device& device, int64_t bytes) {
  Scratch& scratch = scratch_of(device);
  const std::lock_guard guard(scratch.lock);
  scratch.grow(device, bytes);
}

void release_plain_weights(const at::Device& device) {
  Scratch& scratch = scratch_of(device);
  const std::lock_guard guard(scratch.lock);
  scratch.bytes = at::Tensor();
}

int64_t reserved_plain_weights(const at::Device& device) {
  Scratch& scratch = scratch_of(device);
  const std::lock_guard guard(scratch.lock);
  return scratch.bytes.defined() ? scratch.bytes.numel() : 0;
}

}  // namespace flux
