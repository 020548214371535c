#include "common/engine/ring.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>

#include "common/core/cancel.h"
#include "common/core/threads.h"
#include "common/engine/record_layout.h"
#include "common/tensor/memory.h"

namespace flux::engine {
namespace {

/// What one thread reads at a time.
constexpr int64_t kPartBytes = int64_t{16} << 20;
/// Buffers between a store and a GPU, for each thread: one is filled while the other is copied.
constexpr size_t kNumStagings = 2;
constexpr auto kCancelPoll = std::chrono::milliseconds(100);

using Clock = std::chrono::steady_clock;
using Part = std::pair<int64_t, int64_t>;  // offset, bytes
using SharedEvent = std::shared_ptr<c10::Event>;

/// A record in the arena, or on its way there.
struct Resident {
  int64_t record = 0, offset = 0, bytes = 0;
  int64_t room = 0;   // bytes that the plan gave it
  int64_t open = 0;   // positions planned here and not yet released
  int64_t held = 0;   // of them: leases
  size_t unread = 0;  // parts
  bool dirty = false, writing = false;
  std::vector<SharedEvent> ready;  // of the copies to a GPU, by thread
  SharedEvent free;                // of the work that used it last
};
using SharedResident = std::shared_ptr<Resident>;

bool overlap(const Resident& a, int64_t offset, int64_t room) {
  return a.offset < offset + room && offset < a.offset + a.room;
}

/// Copies between the store and a GPU's memory: a stream of its own and pinned buffers.
class DeviceCopies {
 public:
  explicit DeviceCopies(at::Device device)
      : device_(device),
        stream_(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device)) {
    for (auto& staging : stagings_) {
      staging.memory = at::empty({kPartBytes}, at::TensorOptions(at::kByte).pinned_memory(true));
      staging.copied = std::make_unique<c10::Event>(device.type());
    }
  }

  /// The memory may go to somebody else afterwards.
  ~DeviceCopies() {
    try {
      stream_.synchronize();
    } catch (const std::exception&) {
      // a broken device has told of itself elsewhere
    }
  }
  DeviceCopies(const DeviceCopies&) = delete;
  DeviceCopies& operator=(const DeviceCopies&) = delete;

  void wait_for(const SharedEvent& event) const {
    if (event) event->block(stream_);
  }

  /// `to` is a part of the arena; `whole`, with a record's last part: all of it. Returns the event of its last copy.
  SharedEvent read(const RecordStore& store,
                   int64_t record,
                   int64_t offset,
                   const at::Tensor& to,
                   const at::Tensor& whole) {
    const c10::StreamGuard guard(stream_);
    const std::byte* pinned = store.pinned(record);
    for (int64_t done = 0; done < to.size(0);) {
      const int64_t take = std::min(kPartBytes, to.size(0) - done);
      if (pinned) {
        to.narrow(0, done, take)
            .copy_(at::from_blob(const_cast<std::byte*>(pinned + offset + done),
                                 {take},
                                 at::TensorOptions(at::kByte)),
                   /*non_blocking=*/true);
      } else {
        Staging& staging = next_staging();
        store.read(record, offset + done, staging.bytes(take));
        to.narrow(0, done, take).copy_(staging.memory.narrow(0, 0, take), /*non_blocking=*/true);
        staging.copied->record(stream_);
      }
      done += take;
    }
    if (whole.defined()) store.complete(record, whole);
    auto event = std::make_shared<c10::Event>(device_.type());
    event->record(stream_);
    return event;
  }

  void write(RecordStore& store, int64_t record, int64_t offset, const at::Tensor& from) {
    const c10::StreamGuard guard(stream_);
    for (int64_t done = 0; done < from.size(0);) {
      const int64_t take = std::min(kPartBytes, from.size(0) - done);
      Staging& staging = next_staging();
      staging.memory.narrow(0, 0, take).copy_(from.narrow(0, done, take), /*non_blocking=*/true);
      staging.copied->record(stream_);
      staging.copied->synchronize();
      store.write(record, offset + done, staging.bytes(take));
      done += take;
    }
  }

 private:
  struct Staging {
    at::Tensor memory;
    std::unique_ptr<c10::Event> copied;
    std::span<std::byte> bytes(int64_t count) const {
      return {static_cast<std::byte*>(memory.data_ptr()), static_cast<size_t>(count)};
    }
  };
  Staging& next_staging() {
    Staging& staging = stagings_[next_++ % kNumStagings];
    staging.copied->synchronize();
    return staging;
  }

  at::Device device_;
  c10::Stream stream_;
  std::array<Staging, kNumStagings> stagings_;
  size_t next_ = 0;
};

}  // namespace

class Ring::Impl {
 public:
  Impl(std::shared_ptr<RecordStore> store,
       at::Device device,
       std::vector<int64_t> cycle,
       const RingOptions& options,
       RingContents contents)
      : store_(std::move(store)), device_(device), options_(options), contents_(contents) {
    for (int64_t i = 0; i < store_->num_records(); ++i)
      record_bytes_.push_back(store_->record_bytes(i));
    plan_ =
        plan_ring(record_bytes_, cycle, options.lookahead, options.capacity_bytes, options.slots);
    cycle_ = std::move(cycle);
    make_arena();
    {
      const std::scoped_lock lock(mutex_);
      advance();
    }
    if (device_.is_meta()) return;
    const int readers = std::max(1, options.read_threads);
    try {
      threads_ = start_threads(readers, [this] { read_loop(); });
      if (store_->writable()) {
        auto writers = start_threads(1, [this] { write_loop(); });
        threads_.push_back(std::move(writers.front()));
      }
    } catch (...) {
      stop();
      throw;
    }
  }

  ~Impl() { stop(); }

  Lease acquire() {
    std::unique_lock lock(mutex_);
    if (!options_.repeats && next_position_ == static_cast<int64_t>(cycle_.size()))
      throw std::logic_error("Ring: the schedule is at its end");
    wait(lock, [&] {
      if (!ahead_.empty()) return ahead_.front()->unread == 0;
      if (blocker_ && blocker_->held == blocker_->open && blocker_->held > 0)
        throw std::logic_error(fmt::format("Ring: no room for position {} while record {} is held",
                                           next_position_,
                                           blocker_->record));
      return false;
    });
    const SharedResident resident = ahead_.front();
    ahead_.pop_front();
    ++resident->held;
    const int64_t position = next_position_++;
    leases_[position] = resident;
    advance();
    const auto stream = current_stream();
    if (stream)
      for (const SharedEvent& event : resident->ready)
        if (event) event->block(*stream);
    return {
        arena_.narrow(0, resident->offset, record_bytes_[static_cast<size_t>(resident->record)]),
        resident->record,
        position};
  }

  void release(const Lease& lease, bool dirty) {
    const std::scoped_lock lock(mutex_);
    const auto it = leases_.find(lease.position);
    if (it == leases_.end())
      throw std::logic_error(fmt::format("Ring: position {} is not held", lease.position));
    if (dirty && !store_->writable())
      throw std::logic_error("Ring: a changed record of a store that is read only");
    const SharedResident resident = it->second;
    leases_.erase(it);
    if (const auto stream = current_stream()) {
      resident->free = std::make_shared<c10::Event>(device_.type());
      resident->free->record(*stream);
    }
    --resident->held;
    --resident->open;
    resident->dirty = resident->dirty || (dirty && !device_.is_meta());
    if (resident->dirty && !plan_.at(lease.position).kept) queue_write(resident);
    advance();
  }

  void flush() {
    std::unique_lock lock(mutex_);
    if (!leases_.empty()) throw std::logic_error("Ring: flush while a record is held");
    for (const SharedResident& resident : residents_)
      if (resident->dirty && !resident->writing) queue_write(resident);
    wait(lock,
         [&] { return std::ranges::none_of(residents_, [](const auto& r) { return r->dirty; }); });
  }

  void set_schedule(std::vector<int64_t> cycle, RingContents contents) {
    flush();
    RingPlan plan = plan_for(cycle);
    std::unique_lock lock(mutex_);
    const auto all_read = [&] { return reads_.empty() && reading_ == 0; };
    if (options_.repeats) {
      restarting_ = true;
      reads_.clear();
    }
    wait(lock, all_read);
    restarting_ = false;
    plan_ = std::move(plan);
    cycle_ = std::move(cycle);
    contents_ = contents;
    residents_.clear();
    ahead_.clear();
    blocker_.reset();
    planned_ = next_position_ = 0;
    advance();
  }

  int64_t capacity() const { return plan_.capacity; }
  const RingPlan& plan() const { return plan_; }
  RingCounts counts() const {
    const std::scoped_lock lock(mutex_);
    return counts_;
  }

 private:
  struct Read {
    SharedResident resident;
    std::vector<Part> parts;
    size_t next = 0;
    std::vector<SharedEvent> after;  // of the work that used the memory before
  };

  /// With as much lookahead as the arena allows.
  RingPlan plan_for(std::span<const int64_t> cycle) const {
    for (int64_t lookahead = options_.lookahead; lookahead > 1; --lookahead) {
      try {
        return plan_ring(record_bytes_, cycle, lookahead, plan_.capacity, options_.slots);
      } catch (const std::invalid_argument&) {
        // another order may need more room than the one the arena was made for
      }
    }
    return plan_ring(record_bytes_, cycle, 1, plan_.capacity, options_.slots);
  }

  void make_arena() {
    if (device_.is_cpu()) {
      auto memory = std::make_shared<HostMemory>(plan_.capacity, MemoryCause::kRing);
      arena_data_ = memory->data();
      arena_ = at::from_blob(
          arena_data_, {plan_.capacity}, [memory](void*) {}, at::TensorOptions(at::kByte));
    } else {
      const MemoryScope scope(MemoryCause::kRing);
      arena_ = at::empty({plan_.capacity}, at::TensorOptions(at::kByte).device(device_));
      if (const auto stream = current_stream()) {
        // the memory may have been that of a tensor which work in the queue still reads
        born_ = std::make_shared<c10::Event>(device_.type());
        born_->record(*stream);
      }
    }
  }

  bool on_gpu() const { return !device_.is_cpu() && !device_.is_meta(); }
  std::optional<c10::Stream> current_stream() const {
    if (!on_gpu()) return std::nullopt;
    return c10::impl::VirtualGuardImpl(device_.type()).getStream(device_);
  }

  /// Waits until `done` or a thread failed, and rethrows what it threw.
  template <class Done>
  void wait(std::unique_lock<std::mutex>& lock, const Done& done) {
    if (error_) std::rethrow_exception(error_);
    const auto begin = Clock::now();
    while (!done()) {
      if (options_.interruptible) {
        cancel::check();
        consumer_.wait_for(lock, kCancelPoll);
      } else {
        consumer_.wait(lock);
      }
      if (error_) std::rethrow_exception(error_);
    }
    counts_.waited_seconds += std::chrono::duration<double>(Clock::now() - begin).count();
  }

  // --- under the lock

  /// Gives places to the next positions as far as their memory is free.
  void advance() {
    // what is never overwritten could be planned without end
    const auto cycle = static_cast<int64_t>(cycle_.size());
    const int64_t limit = options_.repeats ? next_position_ + cycle : cycle;
    blocker_.reset();
    while (!error_ && !restarting_ && planned_ < limit && place(plan_.at(planned_))) ++planned_;
    consumer_.notify_all();
  }

  bool place(const Placement& placement) {
    if (!placement.load) {
      const auto it = std::ranges::find_if(
          residents_, [&](const auto& r) { return r->record == placement.record; });
      ++(*it)->open;
      ahead_.push_back(*it);
      return true;
    }
    const int64_t bytes = record_bytes_[static_cast<size_t>(placement.record)];
    const int64_t room = (bytes + kRecordAlignment - 1) / kRecordAlignment * kRecordAlignment;
    std::vector<SharedEvent> after;
    if (born_) after.push_back(born_);
    for (const SharedResident& old : residents_) {
      if (!overlap(*old, placement.offset, room)) continue;
      if (old->open > 0 || old->unread > 0 || old->dirty) {
        blocker_ = old;
        return false;
      }
      if (old->free) after.push_back(old->free);
    }
    std::erase_if(residents_,
                  [&](const auto& old) { return overlap(*old, placement.offset, room); });
    auto resident = std::make_shared<Resident>();
    resident->record = placement.record;
    resident->offset = placement.offset;
    resident->bytes = bytes;
    resident->room = room;
    resident->open = 1;
    residents_.push_back(resident);
    ahead_.push_back(resident);
    if (contents_ == RingContents::kNone) return true;
    ++counts_.loads;
    counts_.bytes_read += bytes;
    if (device_.is_meta()) return true;
    Read read{resident, store_->parts(placement.record, kPartBytes), 0, std::move(after)};
    if (read.parts.empty()) read.parts.emplace_back(0, 0);  // all of it comes by complete()
    resident->unread = read.parts.size();
    reads_.push_back(std::move(read));
    workers_.notify_all();
    return true;
  }

  void queue_write(const SharedResident& resident) {
    resident->writing = true;
    writes_.push_back(resident);
    workers_.notify_all();
  }

  // --- threads

  /// One thread an operation: the cores belong to the work that the records are read for.
  static void use_one_thread() {
    at::get_num_threads();  // sets it, at a thread's first call
    omp_set_num_threads(1);
  }

  void read_loop() {
    std::unique_ptr<DeviceCopies> copies;
    use_one_thread();
    std::unique_lock lock(mutex_);
    while (true) {
      workers_.wait(lock, [&] { return stop_ || !reads_.empty(); });
      if (stop_) return;
      Read& read = reads_.front();
      const SharedResident resident = read.resident;
      const Part part = read.parts[read.next++];
      const bool first = read.next == 1, last = read.next == read.parts.size();
      const auto after = read.after;
      if (read.next == read.parts.size()) reads_.pop_front();
      ++reading_;
      lock.unlock();
      SharedEvent ready;
      std::exception_ptr error;
      try {
        if (first) store_->prefetch(resident->record);
        if (on_gpu()) {
          if (!copies) copies = std::make_unique<DeviceCopies>(device_);
          for (const SharedEvent& event : after) copies->wait_for(event);
          ready = copies->read(
              *store_,
              resident->record,
              part.first,
              arena_.narrow(0, resident->offset + part.first, part.second),
              last ? arena_.narrow(0, resident->offset, resident->bytes) : at::Tensor());
        } else {
          store_->read(
              resident->record,
              part.first,
              {arena_data_ + resident->offset + part.first, static_cast<size_t>(part.second)});
          if (last)
            store_->complete(resident->record, arena_.narrow(0, resident->offset, resident->bytes));
        }
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      --reading_;
      if (error) {
        if (!error_) error_ = error;
        reads_.clear();
      } else {
        if (ready) resident->ready.push_back(std::move(ready));
        --resident->unread;
      }
      if (resident->unread == 0 || error || reading_ == 0) advance();
    }
  }

  void write_loop() {
    std::unique_ptr<DeviceCopies> copies;
    use_one_thread();
    std::unique_lock lock(mutex_);
    while (true) {
      workers_.wait(lock, [&] { return stop_ || (!writes_.empty() && !error_); });
      if (stop_) return;
      const SharedResident resident = writes_.front();
      writes_.pop_front();
      lock.unlock();
      std::exception_ptr error;
      try {
        if (on_gpu()) {
          if (!copies) copies = std::make_unique<DeviceCopies>(device_);
          copies->wait_for(resident->free);
        }
        for (const auto& [offset, take] : store_->parts(resident->record, kPartBytes)) {
          if (stopping()) return;
          if (on_gpu())
            copies->write(*store_,
                          resident->record,
                          offset,
                          arena_.narrow(0, resident->offset + offset, take));
          else
            store_->write(resident->record,
                          offset,
                          {arena_data_ + resident->offset + offset, static_cast<size_t>(take)});
        }
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      resident->writing = false;
      if (error) {
        if (!error_) error_ = error;
        reads_.clear();
      } else {
        resident->dirty = false;
        ++counts_.write_backs;
        counts_.bytes_written += resident->bytes;
      }
      advance();
    }
  }

  bool stopping() const {
    const std::scoped_lock lock(mutex_);
    return stop_;
  }

  void stop() {
    {
      const std::scoped_lock lock(mutex_);
      stop_ = true;
    }
    workers_.notify_all();
    threads_.clear();  // joins
  }

  std::shared_ptr<RecordStore> store_;
  at::Device device_;
  RingOptions options_;
  RingContents contents_;
  std::vector<int64_t> record_bytes_, cycle_;
  RingPlan plan_;
  at::Tensor arena_;
  std::byte* arena_data_ = nullptr;  // on the CPU
  SharedEvent born_;                 // on a GPU: of the arena

  mutable std::mutex mutex_;
  std::condition_variable workers_, consumer_;
  std::vector<SharedResident> residents_;
  std::deque<SharedResident> ahead_;  // of positions [next_position_, planned_)
  SharedResident blocker_;            // in whose memory position planned_ will lie
  std::map<int64_t, SharedResident> leases_;
  std::deque<Read> reads_;
  std::deque<SharedResident> writes_;
  int64_t next_position_ = 0, planned_ = 0;
  int reading_ = 0;  // parts in progress
  std::exception_ptr error_;
  bool stop_ = false, restarting_ = false;
  RingCounts counts_;
  std::vector<std::jthread> threads_;
};

RingCounts& RingCounts::operator+=(const RingCounts& other) {
  loads += other.loads;
  bytes_read += other.bytes_read;
  write_backs += other.write_backs;
  bytes_written += other.bytes_written;
  waited_seconds += other.waited_seconds;
  return *this;
}

Ring::Ring(std::shared_ptr<RecordStore> store,
           at::Device device,
           std::vector<int64_t> cycle,
           const RingOptions& options,
           RingContents contents)
    : impl_(std::make_unique<Impl>(std::move(store), device, std::move(cycle), options, contents)) {
}
Ring::~Ring() = default;

Lease Ring::acquire() { return impl_->acquire(); }
void Ring::release(Lease lease, bool dirty) { impl_->release(lease, dirty); }
void Ring::flush() { impl_->flush(); }
void Ring::set_schedule(std::vector<int64_t> cycle, RingContents contents) {
  impl_->set_schedule(std::move(cycle), contents);
}
int64_t Ring::capacity_bytes() const { return impl_->capacity(); }
const RingPlan& Ring::plan() const { return impl_->plan(); }
RingCounts Ring::counts() const { return impl_->counts(); }

int64_t Ring::staging_bytes(const RecordStore& store,
                            at::Device device,
                            const RingOptions& options) {
  const int64_t readers = std::max(1, options.read_threads);
  const int64_t on_way = readers * store.staging_bytes();
  if (device.is_cpu()) return on_way;
  return on_way + (readers + (store.writable() ? 1 : 0)) * int64_t{kNumStagings} * kPartBytes;
}

}  // namespace flux::engine
