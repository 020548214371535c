#include "common/engine/block_inputs.h"

#include <ATen/ops/empty.h>

#include <stdexcept>
#include <utility>

#include "common/tensor/memory.h"
#include "common/tensor/tensor.h"

namespace flux::engine {

BlockInputs::BlockInputs(InputPlace place, std::filesystem::path scratch)
    : place_(place), scratch_(std::move(scratch)) {}

BlockInputs::Stored BlockInputs::store(const at::Tensor& tensor) {
  Stored stored{{}, tensor.options(), tensor.sizes().vec(), -1};
  if (place_ == InputPlace::kDevice || (place_ == InputPlace::kHost && tensor.is_cpu())) {
    count_as(tensor, MemoryCause::kBlockInputs);
    stored.tensor = tensor;
  } else if (tensor.is_meta()) {
    // a plan: the device's memory is free again
  } else if (place_ == InputPlace::kHost) {
    const MemoryScope scope(MemoryCause::kBlockInputs);
    stored.tensor = tensor.cpu();
  } else {
    const at::Tensor host = tensor.cpu().contiguous();
    if (!file_) file_.emplace(scratch_, "block inputs");
    stored.offset = end_;
    end_ += static_cast<int64_t>(host.nbytes());
    file_->write(stored.offset, host_bytes(host));
  }
  return stored;
}

at::Tensor BlockInputs::restore(const Stored& stored) const {
  if (stored.tensor.defined()) return stored.tensor.to(stored.options.device());
  const MemoryScope scope(MemoryCause::kBlockInputs);
  if (stored.options.device().is_meta()) return at::empty(stored.shape, stored.options);
  const at::Tensor host = at::empty(stored.shape, stored.options.device(at::kCPU));
  file_->read(stored.offset, {static_cast<std::byte*>(host.mutable_data_ptr()), host.nbytes()});
  return host.to(stored.options.device());
}

void BlockInputs::keep(int64_t block, size_t micro, std::vector<at::Tensor> tensors) {
  auto& stored = kept_[{block, micro}];
  stored.clear();
  for (at::Tensor& tensor : tensors) {
    stored.push_back(store(tensor));
    tensor.reset();
  }
}

std::vector<at::Tensor> BlockInputs::take(int64_t block, size_t micro) {
  const auto entry = kept_.find({block, micro});
  if (entry == kept_.end()) throw std::out_of_range("block inputs that were not kept");
  std::vector<at::Tensor> tensors;
  for (const Stored& stored : entry->second) tensors.push_back(restore(stored));
  kept_.erase(entry);
  if (kept_.empty()) end_ = 0;
  return tensors;
}

void BlockInputs::clear() {
  kept_.clear();
  end_ = 0;
}

}  // namespace flux::engine
