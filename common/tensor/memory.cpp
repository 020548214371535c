#include "common/tensor/memory.h"

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace flux {
namespace {

thread_local MemoryCause current_cause = MemoryCause::kOther;

int64_t rounded(size_t bytes, int64_t to = kMemoryGranule) {
  return (static_cast<int64_t>(bytes) + to - 1) / to * to;
}

class Meter {
 public:
  void add(int64_t bytes, MemoryCause cause) {
    const std::scoped_lock lock(mutex_);
    use_.live += bytes;
    live_[static_cast<size_t>(cause)] += bytes;
    if (use_.live <= use_.peak) return;
    use_.peak = use_.live;
    use_.causes = live_;
    highest_ = std::max(highest_, use_.peak);
  }
  void subtract(int64_t bytes, MemoryCause cause) {
    const std::scoped_lock lock(mutex_);
    use_.live -= bytes;
    live_[static_cast<size_t>(cause)] -= bytes;
  }
  void reset_peak() {
    const std::scoped_lock lock(mutex_);
    use_.peak = use_.live;
    use_.causes = live_;
  }
  void move(int64_t bytes, MemoryCause from, MemoryCause to) {
    const std::scoped_lock lock(mutex_);
    live_[static_cast<size_t>(from)] -= bytes;
    live_[static_cast<size_t>(to)] += bytes;
  }
  MemoryUse use() const {
    const std::scoped_lock lock(mutex_);
    return use_;
  }
  int64_t live() const {
    const std::scoped_lock lock(mutex_);
    return use_.live;
  }
  /// Largest live ever, whatever was reset.
  int64_t highest() const {
    const std::scoped_lock lock(mutex_);
    return highest_;
  }

 private:
  mutable std::mutex mutex_;
  MemoryUse use_;
  MemoryByCause live_{};
  int64_t highest_ = 0;
};

// Never destroyed: tensors in static objects are freed after main().
Meter& cpu_meter() {
  static auto* meter = new Meter;
  return *meter;
}
Meter& meta_meter() {
  static auto* meter = new Meter;
  return *meter;
}

// Before each block of memory. LibTorch wants a block's address to be its context too (oneDNN's allocations insist), so
// what the deleter must know lies in front of it.
struct Header {
  int64_t counted = 0;  // bytes, rounded to kMemoryGranule
  int64_t mapped = 0;   // bytes of the mapping; 0: from malloc
  MemoryCause cause = MemoryCause::kOther;
};
constexpr size_t kHeaderBytes = 64;
static_assert(sizeof(Header) <= kHeaderBytes);

// Blocks of at least this are mapped, so that freeing them gives the memory back, and kept for reuse. Smaller ones would
// leave holes in malloc's heap: the gradients of 12 billion parameters' adapters are 600 tensors below 1 MiB.
constexpr size_t kMappedBytes = size_t{128} << 10;
constexpr int64_t kHugePage = int64_t{1} << 21;
constexpr int64_t kPage = 4096;
/// A kept block is cut to at least this part of it.
constexpr int64_t kLargestCut = 2;

class CpuAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::kCPU)};
    const Header header{rounded(bytes),
                        bytes >= kMappedBytes ? rounded(bytes + kHeaderBytes, kPage) : 0,
                        current_cause};
    std::byte* base = header.mapped ? map(header.mapped, wants_huge_pages(header.cause))
                                    : from_malloc(bytes + kHeaderBytes);
    std::memcpy(base, &header, sizeof(header));
    cpu_meter().add(header.counted, header.cause);
    std::byte* data = base + kHeaderBytes;
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }

  void drop_cache() {
    const std::scoped_lock lock(mutex_);
    while (!order_.empty()) drop_oldest();
  }

 private:
  static std::byte* from_malloc(size_t bytes) {
    void* base = nullptr;
    TORCH_CHECK(
        posix_memalign(&base, 64, bytes) == 0, "flux: can't allocate memory: ", bytes, " bytes");
    return static_cast<std::byte*>(base);
  }

  /// Weights and states are filled once, from front to back. A virtual machine that hands free huge pages back to its
  /// host gets each anew: 2.6 GB of weights took 2.2 to 9.6 s to load with them and 1.3 s without.
  static bool wants_huge_pages(MemoryCause cause) {
    return cause != MemoryCause::kWeights && cause != MemoryCause::kOptimizer;
  }

  std::byte* map(int64_t bytes, bool huge_pages) {
    {
      const std::scoped_lock lock(mutex_);
      if (std::byte* base = take_kept(bytes)) return base;
      keep_within(bytes);
    }
    // aligned, so that huge pages can back it
    const int64_t extra = huge_pages && bytes >= kHugePage ? kHugePage : 0;
    void* mapped = mmap(nullptr,
                        static_cast<size_t>(bytes + extra),
                        PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                        -1,
                        0);
    TORCH_CHECK(mapped != MAP_FAILED, "flux: can't allocate memory: ", bytes, " bytes");
    auto* base = static_cast<std::byte*>(mapped);
    if (extra == 0) return base;
    const auto address = reinterpret_cast<uintptr_t>(base);
    const int64_t before = (kHugePage - static_cast<int64_t>(address % kHugePage)) % kHugePage;
    if (before > 0) munmap(base, static_cast<size_t>(before));
    if (extra > before) munmap(base + before + bytes, static_cast<size_t>(extra - before));
    base += before;
    madvise(base, static_cast<size_t>(bytes), MADV_HUGEPAGE);
    return base;
  }

  /// The smallest one that is large enough, without what is too much of it: pages that are there need not be cleared.
  std::byte* take_kept(int64_t bytes) {
    const auto found = kept_.lower_bound(bytes);
    if (found == kept_.end() || found->first > kLargestCut * bytes) return nullptr;
    const int64_t size = found->first;
    std::byte* base = found->second.back();
    found->second.pop_back();
    if (found->second.empty()) kept_.erase(found);
    kept_bytes_ -= size;
    std::erase_if(order_, [&](const auto& entry) { return entry.second == base; });
    if (size > bytes) munmap(base + bytes, static_cast<size_t>(size - bytes));
    return base;
  }

  static void release(void* data);

  void give_back(std::byte* base, int64_t bytes) {
    const std::scoped_lock lock(mutex_);
    kept_[bytes].push_back(base);
    kept_bytes_ += bytes;
    order_.emplace_back(bytes, base);
    keep_within(0);
  }

  /// What is live (arenas too), what is about to be and what is kept stay within the highest peak.
  void keep_within(int64_t more) {
    const int64_t limit = cpu_meter().highest() - cpu_meter().live() - more;
    while (kept_bytes_ > 0 && kept_bytes_ > limit) drop_oldest();
  }

  void drop_oldest() {
    const auto [bytes, base] = order_.front();
    order_.pop_front();
    auto& same = kept_[bytes];
    std::erase(same, base);
    if (same.empty()) kept_.erase(bytes);
    kept_bytes_ -= bytes;
    munmap(base, static_cast<size_t>(bytes));
  }

  std::mutex mutex_;
  std::map<int64_t, std::vector<std::byte*>> kept_;   // by the size of the mapping; none empty
  std::deque<std::pair<int64_t, std::byte*>> order_;  // of kept ones, the oldest first
  int64_t kept_bytes_ = 0;
};

CpuAllocator& cpu_allocator() {
  static auto* allocator = new CpuAllocator;
  return *allocator;
}

void CpuAllocator::release(void* data) {
  if (!data) return;
  std::byte* base = static_cast<std::byte*>(data) - kHeaderBytes;
  Header header;
  std::memcpy(&header, base, sizeof(header));
  cpu_meter().subtract(header.counted, header.cause);
  if (header.mapped)
    cpu_allocator().give_back(base, header.mapped);
  else
    std::free(base);
}

struct MetaRecord {
  int64_t counted = 0;
  MemoryCause cause = MemoryCause::kOther;
};

class MetaAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto* record = new MetaRecord{rounded(bytes), current_cause};
    meta_meter().add(record->counted, record->cause);
    return {nullptr, record, &release, c10::Device(c10::kMeta)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, size_t) const override {}

 private:
  static void release(void* context) {
    const auto* record = static_cast<MetaRecord*>(context);
    meta_meter().subtract(record->counted, record->cause);
    delete record;
  }
};

bool installed = false;

}  // namespace

void count_as(const at::Tensor& tensor, MemoryCause cause) {
  if (!installed || !tensor.defined() || tensor.nbytes() == 0) return;
  const auto& memory = tensor.storage().data_ptr();
  if (memory.get_deleter() == cpu_allocator().raw_deleter()) {
    std::byte* base = static_cast<std::byte*>(memory.get_context()) - kHeaderBytes;
    Header header;
    std::memcpy(&header, base, sizeof(header));
    cpu_meter().move(header.counted, std::exchange(header.cause, cause), cause);
    std::memcpy(base, &header, sizeof(header));
  } else if (tensor.is_meta()) {
    auto* record = static_cast<MetaRecord*>(memory.get_context());
    meta_meter().move(record->counted, std::exchange(record->cause, cause), cause);
  }
}

std::string_view memory_cause_name(MemoryCause cause) {
  constexpr std::array<std::string_view, kNumMemoryCauses> names{"other",
                                                                 "weights",
                                                                 "ring",
                                                                 "block_inputs",
                                                                 "block_working_set",
                                                                 "gradients",
                                                                 "optimizer",
                                                                 "kernel_scratch",
                                                                 "data"};
  return names.at(static_cast<size_t>(cause));
}

MemoryScope::MemoryScope(MemoryCause cause) : before_(std::exchange(current_cause, cause)) {}
MemoryScope::~MemoryScope() { current_cause = before_; }

void count_tensor_memory() {
  if (std::exchange(installed, true)) return;
  c10::SetCPUAllocator(&cpu_allocator(), /*priority=*/1);
  c10::SetAllocator(c10::kMeta, new MetaAllocator, /*priority=*/1);
}
bool counts_tensor_memory() { return installed; }

MemoryUse cpu_memory() { return cpu_meter().use(); }
MemoryUse meta_memory() { return meta_meter().use(); }
void reset_cpu_peak() { cpu_meter().reset_peak(); }
void reset_meta_peak() { meta_meter().reset_peak(); }
void release_cached_memory() { cpu_allocator().drop_cache(); }

CountedMemory::CountedMemory(int64_t bytes, MemoryCause cause)
    : bytes_(rounded(static_cast<size_t>(bytes))), cause_(cause) {
  cpu_meter().add(bytes_, cause_);
}
CountedMemory::~CountedMemory() {
  if (bytes_ > 0) cpu_meter().subtract(bytes_, cause_);
}
CountedMemory::CountedMemory(CountedMemory&& other) noexcept
    : bytes_(std::exchange(other.bytes_, 0)), cause_(other.cause_) {}
CountedMemory& CountedMemory::operator=(CountedMemory&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  std::swap(cause_, other.cause_);
  return *this;
}

}  // namespace flux
