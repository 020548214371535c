// common/engine/record_store.h - where records are when they are not in the ring: in memory
// (here), in a scratch file (file_arena.h), in a model's file (model_file.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "common/tensor/fwd.h"
#include "common/tensor/memory.h"

namespace flux::engine {

/// Records by number, each of a length of its own, a multiple of kRecordAlignment.
class RecordStore {
 public:
  virtual ~RecordStore() = default;
  virtual int64_t num_records() const = 0;
  virtual int64_t record_bytes(int64_t index) const = 0;

  /// Copies record bytes [offset, offset + to.size()) to `to`; from any thread. Both numbers are
  /// multiples of kSliceAlignment. Throws an Error that names the file.
  virtual void read(int64_t index, int64_t offset, std::span<std::byte> to) const = 0;
  /// The whole record.
  void read(int64_t index, std::span<std::byte> to) const { read(index, 0, to); }
  /// Makes a record whole whose parts(), all of them, were read to their places in it; on a GPU in the current stream.
  virtual void complete(int64_t /*index*/, const at::Tensor& /*record*/) const {}
  /// Tells that the record will be read soon.
  virtual void prefetch(int64_t /*index*/) const {}

  virtual bool writable() const { return false; }
  /// The inverse of read(). Throws std::logic_error unless writable().
  virtual void write(int64_t index, int64_t offset, std::span<const std::byte> from);
  void write(int64_t index, std::span<const std::byte> from) { write(index, 0, from); }

  /// Ranges (offset, bytes) to be read, and written, that together are the record, unless complete() adds what is
  /// missing; none larger than `max_bytes` unless
  /// reading it in smaller pieces would cost more.
  virtual std::vector<std::pair<int64_t, int64_t>> parts(int64_t index, int64_t max_bytes) const;
  /// Memory that one read holds while it runs, for plans.
  virtual int64_t staging_bytes() const { return 0; }
  /// The record where it lies, if it lies in memory that a GPU can copy from; else nullptr.
  virtual const std::byte* pinned(int64_t /*index*/) const { return nullptr; }

 protected:
  /// Throws std::invalid_argument if there is no such record or the range is not inside it.
  void check_range(int64_t index, int64_t offset, size_t bytes) const;
};

/// Memory of its own: page-aligned, on huge pages where the system has them, counted as
/// CountedMemory. Zero at first.
class HostMemory {
 public:
  /// Throws OutOfMemory naming the bytes.
  HostMemory(int64_t bytes, MemoryCause cause);
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  /// Registers it with the CUDA driver, so that copies to a GPU do not wait. Whether that worked;
  /// false without CUDA.
  bool pin();
  bool is_pinned() const { return pinned_; }

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  bool pinned_ = false;
  CountedMemory counted_;
};

/// Records in host memory. Reads and writes of one record at the same time are the caller's to
/// keep apart.
class MemoryStore final : public RecordStore {
 public:
  enum class Pin { kNo, kIfPossible };
  /// Zeroed records of these lengths. Throws OutOfMemory.
  explicit MemoryStore(std::vector<int64_t> record_bytes,
                       Pin pin = Pin::kNo,
                       MemoryCause cause = MemoryCause::kWeights);

  int64_t num_records() const override { return static_cast<int64_t>(bytes_.size()); }
  int64_t record_bytes(int64_t index) const override {
    return bytes_.at(static_cast<size_t>(index));
  }
  using RecordStore::read;
  using RecordStore::write;
  void read(int64_t index, int64_t offset, std::span<std::byte> to) const override;
  bool writable() const override { return true; }
  void write(int64_t index, int64_t offset, std::span<const std::byte> from) override;
  const std::byte* pinned(int64_t index) const override;

  std::span<std::byte> record(int64_t index) const;
  bool is_pinned() const { return memory_.is_pinned(); }

 private:
  std::vector<int64_t> bytes_, begins_;
  HostMemory memory_;
};

/// Sizes alone, for plans on Meta: reading throws std::logic_error.
class PlannedStore final : public RecordStore {
 public:
  PlannedStore(std::vector<int64_t> record_bytes, bool writable)
      : bytes_(std::move(record_bytes)), writable_(writable) {}
  int64_t num_records() const override { return static_cast<int64_t>(bytes_.size()); }
  int64_t record_bytes(int64_t index) const override {
    return bytes_.at(static_cast<size_t>(index));
  }
  using RecordStore::read;
  void read(int64_t index, int64_t offset, std::span<std::byte> to) const override;
  bool writable() const override { return writable_; }

 private:
  std::vector<int64_t> bytes_;
  bool writable_;
};

/// Reads every record of `from` and writes it to `to`, whose lengths are the same; throws
/// std::invalid_argument if not, Interrupted once a signal has come. For a base that is quantised
/// once and streamed from memory or a scratch file afterwards.
void copy_records(const RecordStore& from, RecordStore& to);

}  // namespace flux::engine
