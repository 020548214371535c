// common/engine/gather_store.h - records of which every rank holds an equal part, put together as they are read.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "common/dist/group.h"
#include "common/engine/record_store.h"

namespace flux::engine {

/// The ranks that share weights out, from the view of one.
struct Sharing {
  int64_t world = 1, rank = 0;
  dist::Group* group = nullptr;  // of the ring's thread alone; null in plans
  bool on() const { return world > 1; }
};

/// Record i is the parts i of all ranks, in order of ranks. All ranks read the same records in the same order, one at a
/// time (RingOptions::read_threads = 1, repeats = false). What is written is this rank's part.
class GatherStore final : public RecordStore {
 public:
  /// `parts` has, as its first records, this rank's parts; `staying`, by record, those that are in memory instead, on any
  /// device (uint8), the others undefined. It is read while this lives.
  GatherStore(std::shared_ptr<RecordStore> parts,
              std::vector<at::Tensor> staying,
              std::vector<int64_t> part_bytes,
              const Sharing& sharing);

  int64_t num_records() const override { return static_cast<int64_t>(part_bytes_.size()); }
  int64_t record_bytes(int64_t index) const override { return part(index) * sharing_.world; }
  using RecordStore::read;
  using RecordStore::write;
  void read(int64_t index, int64_t offset, std::span<std::byte> to) const override;
  void complete(int64_t index, const at::Tensor& record) const override;
  void prefetch(int64_t index) const override;
  bool writable() const override { return true; }
  void write(int64_t index, int64_t offset, std::span<const std::byte> from) override;
  /// Of this rank's part; none if it stays in memory.
  std::vector<std::pair<int64_t, int64_t>> parts(int64_t index, int64_t max_bytes) const override;
  int64_t staging_bytes() const override { return parts_ ? parts_->staging_bytes() : 0; }

 private:
  int64_t part(int64_t index) const { return part_bytes_.at(static_cast<size_t>(index)); }
  int64_t begin(int64_t index) const { return part(index) * sharing_.rank; }

  std::shared_ptr<RecordStore> parts_;  // null if all stay
  std::vector<at::Tensor> staying_;
  std::vector<int64_t> part_bytes_;
  Sharing sharing_;
};

}  // namespace flux::engine
