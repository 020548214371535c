#include "common/engine/state_stream.h"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace flux::engine {

StateStream::StateStream(std::shared_ptr<RecordStore> store,
                         int64_t first_record,
                         std::vector<StateEntry> entries,
                         at::Device device,
                         int64_t lookahead)
    : store_(std::move(store)),
      first_record_(first_record),
      entries_(std::move(entries)),
      device_(device) {
  const auto bytes = record_bytes(entries_);
  const bool gradients_wait =
      std::ranges::any_of(entries_, [](const StateEntry& e) { return e.gradient.bytes() > 0; });
  // states and gradient of an entry are open at the same time
  options_.lookahead = lookahead + (gradients_wait ? 1 : 0);
  options_.capacity_bytes = *std::ranges::max_element(bytes) * (options_.lookahead + 1);
  options_.slots = RingSlots::kEqual;
}

std::vector<int64_t> StateStream::record_bytes(const std::vector<StateEntry>& entries) {
  std::vector<int64_t> bytes;
  for (const StateEntry& entry : entries) {
    bytes.push_back(entry.states.bytes());
    bytes.push_back(entry.gradient.bytes());
  }
  return bytes;
}

int64_t StateStream::record(const Stop& stop) const {
  return first_record_ + 2 * static_cast<int64_t>(stop.entry) + (stop.gradient ? 1 : 0);
}

bool StateStream::expects(size_t entry, Use use) const {
  return ring_ && use == use_ && open_.empty() && order_[next_] == entry;
}

void StateStream::expect(std::vector<size_t> entries, Use use) {
  for (Lease& lease : open_) ring_->release(std::move(lease), false);
  open_.clear();
  order_ = std::move(entries);
  use_ = use;
  next_ = 0;
  std::vector<int64_t> cycle;
  for (const size_t entry : order_) {
    // an optimizer may have no states
    if (use != Use::kPutAway && entries_[entry].states.bytes() > 0)
      cycle.push_back(record({entry, false}));
    if (use != Use::kUpdate) cycle.push_back(record({entry, true}));
  }
  if (cycle.empty()) return;
  const auto contents = use == Use::kPutAway ? RingContents::kNone : RingContents::kRead;
  if (ring_)
    ring_->set_schedule(std::move(cycle), contents);
  else
    ring_ = std::make_unique<Ring>(store_, device_, std::move(cycle), options_, contents);
}

Lease StateStream::acquire(const Stop& expected) {
  Lease lease = ring_->acquire();
  if (lease.index != record(expected))
    throw std::logic_error(
        fmt::format("states: record {} came, {} was expected", lease.index, record(expected)));
  return lease;
}

StateStream::Opened StateStream::open() {
  const size_t entry = order_[next_];
  next_ = (next_ + 1) % order_.size();
  const StateEntry& e = entries_[entry];
  Opened opened;
  if (e.states.bytes() > 0) {
    open_.push_back(acquire({entry, false}));
    for (size_t i = 0; i < e.states.slices().size(); ++i)
      opened.states.push_back(e.states.view(open_.back().record, i));
  }
  if (use_ == Use::kUpdateWithWaiting) {
    open_.push_back(acquire({entry, true}));
    opened.gradient = e.gradient.view(open_.back().record, 0);
  }
  return opened;
}

void StateStream::close(bool changed) {
  for (Lease& lease : open_) {
    const bool states = (lease.index - first_record_) % 2 == 0;
    ring_->release(std::move(lease), changed && states);
  }
  open_.clear();
}

void StateStream::put_away(const at::Tensor& gradient) {
  const size_t entry = order_[next_];
  next_ = (next_ + 1) % order_.size();
  Lease lease = acquire({entry, true});
  const at::Tensor kept = entries_[entry].gradient.view(lease.record, 0);
  gradient.defined() ? kept.copy_(gradient) : kept.zero_();
  ring_->release(std::move(lease), true);
}

}  // namespace flux::engine
