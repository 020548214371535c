#include "common/engine/gather_store.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <utility>

namespace flux::engine {

GatherStore::GatherStore(std::shared_ptr<RecordStore> parts,
                         std::vector<at::Tensor> staying,
                         std::vector<int64_t> part_bytes,
                         const Sharing& sharing)
    : parts_(std::move(parts)),
      staying_(std::move(staying)),
      part_bytes_(std::move(part_bytes)),
      sharing_(sharing) {}

void GatherStore::read(int64_t index, int64_t offset, std::span<std::byte> to) const {
  if (!to.empty()) parts_->read(index, offset - begin(index), to);
}

void GatherStore::write(int64_t index, int64_t offset, std::span<const std::byte> from) {
  parts_->write(index, offset - begin(index), from);
}

void GatherStore::prefetch(int64_t index) const {
  if (parts_ && !staying_[static_cast<size_t>(index)].defined()) parts_->prefetch(index);
}

std::vector<std::pair<int64_t, int64_t>> GatherStore::parts(int64_t index,
                                                            int64_t max_bytes) const {
  if (staying_[static_cast<size_t>(index)].defined()) return {};
  auto of_part = parts_->parts(index, max_bytes);
  for (auto& [offset, bytes] : of_part) offset += begin(index);
  return of_part;
}

void GatherStore::complete(int64_t index, const at::Tensor& record) const {
  const at::NoGradGuard no_grad;
  const at::Tensor own = record.narrow(0, begin(index), part(index));
  if (const at::Tensor& staying = staying_[static_cast<size_t>(index)]; staying.defined())
    own.copy_(staying, /*non_blocking=*/true);
  if (sharing_.group) sharing_.group->all_gather(record, own);
}

}  // namespace flux::engine
