#include "common/engine/record_store.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "common/core/cancel.h"
#include "common/core/text.h"
#include "common/engine/record_layout.h"
#include "common/tensor/memory_errors.h"

namespace flux::engine {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr int64_t kCopyBytes = int64_t{16} << 20;

/// What libflux_cuda.so offers, if it is open; see common/cuda/register.cpp.
template <class Function>
Function* cuda_function(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

std::vector<int64_t> begins_of(std::span<const int64_t> bytes) {
  std::vector<int64_t> begins{0};
  for (const int64_t length : bytes) begins.push_back(begins.back() + length);
  return begins;
}

}  // namespace

void RecordStore::write(int64_t /*index*/, int64_t /*offset*/, std::span<const std::byte>) {
  throw std::logic_error("these records are read only");
}

std::vector<std::pair<int64_t, int64_t>> RecordStore::parts(int64_t index,
                                                            int64_t max_bytes) const {
  std::vector<std::pair<int64_t, int64_t>> parts;
  const int64_t bytes = record_bytes(index);
  for (int64_t offset = 0; offset < bytes; offset += max_bytes)
    parts.emplace_back(offset, std::min(max_bytes, bytes - offset));
  return parts;
}

void RecordStore::check_range(int64_t index, int64_t offset, size_t bytes) const {
  const bool there = index >= 0 && index < num_records();
  if (there && offset >= 0 && offset % kSliceAlignment == 0 && bytes % kSliceAlignment == 0 &&
      offset <= record_bytes(index) && static_cast<int64_t>(bytes) <= record_bytes(index) - offset)
    return;
  throw std::invalid_argument(fmt::format("{} bytes at {} of record {}, which has {}",
                                          bytes,
                                          offset,
                                          index,
                                          there ? record_bytes(index) : 0));
}

HostMemory::HostMemory(int64_t bytes, MemoryCause cause) : bytes_(bytes) {
  if (bytes == 0) return;
  const auto size = static_cast<size_t>(bytes);
  // aligned, so that huge pages can back it
  const size_t extra = size >= kHugePage ? kHugePage : 0;
  void* mapped =
      mmap(nullptr, size + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED)
    throw OutOfMemory(fmt::format("not enough memory for {} ({} bytes) of weights: {}",
                                  show_bytes(size),
                                  bytes,
                                  std::generic_category().message(errno)),
                      "keep fewer weights in memory, or end other programs");
  auto* base = static_cast<std::byte*>(mapped);
  if (extra > 0) {
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(base) % kHugePage) % kHugePage;
    // the end of the mapping is the page that holds its last byte
    const size_t paged = (size + kRecordAlignment - 1) / kRecordAlignment * kRecordAlignment;
    if (before > 0) munmap(base, before);
    if (size + extra > before + paged) munmap(base + before + paged, size + extra - before - paged);
    base += before;
    madvise(base, paged, MADV_HUGEPAGE);
  }
  data_ = base;
  counted_ = CountedMemory(bytes, cause);
}

HostMemory::~HostMemory() {
  if (!data_) return;
  if (pinned_) {
    if (auto* unpin = cuda_function<int(void*)>("flux_cuda_unpin")) unpin(data_);
  }
  munmap(data_, static_cast<size_t>(bytes_));
}

bool HostMemory::pin() {
  if (pinned_ || !data_) return pinned_;
  auto* pin = cuda_function<int(void*, size_t)>("flux_cuda_pin");
  pinned_ = pin && pin(data_, static_cast<size_t>(bytes_)) != 0;
  return pinned_;
}

MemoryStore::MemoryStore(std::vector<int64_t> record_bytes, Pin pin, MemoryCause cause)
    : bytes_(std::move(record_bytes)), begins_(begins_of(bytes_)), memory_(begins_.back(), cause) {
  if (pin == Pin::kIfPossible) memory_.pin();
}

void MemoryStore::read(int64_t index, int64_t offset, std::span<std::byte> to) const {
  check_range(index, offset, to.size());
  if (!to.empty()) std::memcpy(to.data(), record(index).data() + offset, to.size());
}

void MemoryStore::write(int64_t index, int64_t offset, std::span<const std::byte> from) {
  check_range(index, offset, from.size());
  if (!from.empty()) std::memcpy(record(index).data() + offset, from.data(), from.size());
}

const std::byte* MemoryStore::pinned(int64_t index) const {
  return memory_.is_pinned() ? record(index).data() : nullptr;
}

std::span<std::byte> MemoryStore::record(int64_t index) const {
  const auto i = static_cast<size_t>(index);
  return {memory_.data() + begins_.at(i), static_cast<size_t>(bytes_.at(i))};
}

void PlannedStore::read(int64_t, int64_t, std::span<std::byte>) const {
  throw std::logic_error("records of a plan have no bytes");
}

void copy_records(const RecordStore& from, RecordStore& to) {
  if (from.num_records() != to.num_records())
    throw std::invalid_argument(
        fmt::format("copy_records: {} records to {}", from.num_records(), to.num_records()));
  for (int64_t i = 0; i < from.num_records(); ++i)
    if (from.record_bytes(i) != to.record_bytes(i))
      throw std::invalid_argument(fmt::format("copy_records: record {} has {} bytes, its place {}",
                                              i,
                                              from.record_bytes(i),
                                              to.record_bytes(i)));
  int64_t largest = 0;
  for (int64_t i = 0; i < from.num_records(); ++i)
    for (const auto& [offset, bytes] : from.parts(i, kCopyBytes))
      largest = std::max(largest, bytes);
  const HostMemory buffer(largest, MemoryCause::kOther);
  for (int64_t i = 0; i < from.num_records(); ++i) {
    from.prefetch(i);
    for (const auto& [offset, bytes] : from.parts(i, kCopyBytes)) {
      cancel::check();
      const std::span<std::byte> part(buffer.data(), static_cast<size_t>(bytes));
      from.read(i, offset, part);
      to.write(i, offset, part);
    }
  }
}

}  // namespace flux::engine
