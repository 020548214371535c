#include "common/engine/ring_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <stdexcept>
#include <tuple>

#include "common/engine/record_layout.h"

namespace flux::engine {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

/// A record that is in the arena.
struct Item {
  int64_t record = 0, offset = 0, bytes = 0;
  int64_t last = 0;  // position that used it last
};
bool overlap(const Item& a, int64_t offset, int64_t bytes) {
  return a.offset < offset + bytes && offset < a.offset + a.bytes;
}

/// Places records one position after the other. The state is what is in the arena.
class Simulation {
 public:
  Simulation(std::vector<int64_t> bytes,
             std::span<const int64_t> cycle,
             int64_t lookahead,
             int64_t capacity,
             int64_t slot_bytes,
             int64_t num_slots)
      : bytes_(std::move(bytes)),
        cycle_(cycle),
        lookahead_(lookahead),
        capacity_(capacity),
        slot_bytes_(slot_bytes),
        num_slots_(num_slots) {
    const auto length = static_cast<int64_t>(cycle.size());
    for (int64_t i = 0; i < length; ++i) {
      int64_t distance = 1;
      while (at(i + distance) != at(i)) ++distance;
      distance_.push_back(distance);
    }
  }

  /// Until a turn of the cycle begins as an earlier one did. Nothing if a record finds no place.
  std::optional<RingPlan> run(int64_t max_turns) {
    RingPlan plan{capacity_, {}, 0};
    const auto length = static_cast<int64_t>(cycle_.size());
    std::map<std::vector<std::array<int64_t, 3>>, int64_t> seen;
    std::vector<Item> items;
    for (int64_t t = 0; t < max_turns * length; ++t) {
      if (t % length == 0) {
        const auto [known, fresh] = seen.emplace(state(items, t), t);
        if (!fresh) {
          plan.loop = static_cast<size_t>(known->second);
          for (size_t i = 0; i < plan.placements.size(); ++i) {
            const auto p = static_cast<int64_t>(i);
            plan.placements[i].kept = !plan.at(p + distance_[i % cycle_.size()]).load;
          }
          return plan;
        }
      }
      const int64_t record = at(t);
      if (Item* there = find(items, record)) {
        there->last = t;
        plan.placements.push_back({record, there->offset, false, false});
        continue;
      }
      const auto offset = choose(items, t);
      if (!offset) return std::nullopt;
      plan.placements.push_back({record, *offset, true, false});
      place(items, t, *offset);
    }
    return std::nullopt;
  }

 private:
  int64_t at(int64_t t) const { return cycle_[static_cast<size_t>(t) % cycle_.size()]; }
  int64_t bytes_at(int64_t t) const { return bytes_[static_cast<size_t>(at(t))]; }
  int64_t next_use(const Item& item) const {
    return item.last + distance_[static_cast<size_t>(item.last) % cycle_.size()];
  }
  bool is_protected(const Item& item, int64_t t) const { return item.last >= t - lookahead_; }

  static Item* find(std::vector<Item>& items, int64_t record) {
    const auto it =
        std::ranges::find_if(items, [&](const Item& item) { return item.record == record; });
    return it == items.end() ? nullptr : &*it;
  }

  std::vector<std::array<int64_t, 3>> state(const std::vector<Item>& items, int64_t t) const {
    std::vector<std::array<int64_t, 3>> key;
    for (const Item& item : items)
      key.push_back({item.offset, item.record, std::min(t - item.last, lookahead_ + 1)});
    std::ranges::sort(key);
    return key;
  }

  void place(std::vector<Item>& items, int64_t t, int64_t offset) const {
    std::erase_if(items, [&](const Item& item) { return overlap(item, offset, bytes_at(t)); });
    items.push_back({at(t), offset, bytes_at(t), t});
  }

  /// Offsets where the record of position t may go, the best first: what it destroys is needed last.
  std::vector<int64_t> candidates(const std::vector<Item>& items, int64_t t) const {
    const int64_t bytes = bytes_at(t);
    std::set<int64_t> offsets;
    if (slot_bytes_ > 0) {
      for (int64_t slot = 0; slot < num_slots_; ++slot) offsets.insert(slot * slot_bytes_);
    } else {
      offsets = {0, capacity_ - bytes};
      for (const Item& item : items) {
        offsets.insert(item.offset + item.bytes);
        offsets.insert(item.offset - bytes);
      }
    }
    using Score = std::tuple<int64_t, int64_t, int64_t, int64_t>;
    std::vector<std::pair<Score, int64_t>> scored;
    for (const int64_t offset : offsets) {
      if (offset < 0 || offset + bytes > capacity_) continue;
      int64_t soonest = kNever, destroyed = 0;
      bool free = true;
      for (const Item& item : items) {
        if (!overlap(item, offset, bytes)) continue;
        free = free && !is_protected(item, t);
        soonest = std::min(soonest, next_use(item));
        destroyed += item.bytes;
      }
      if (!free) continue;
      // at the arena's edges, so that what is free stays in one piece
      const int64_t from_edge = std::min(offset, capacity_ - bytes - offset);
      scored.push_back({{-soonest, destroyed, from_edge, offset}, offset});
    }
    std::ranges::sort(scored);
    std::vector<int64_t> sorted;
    for (const auto& [score, offset] : scored) sorted.push_back(offset);
    return sorted;
  }

  /// The best place after which the next positions find one too.
  std::optional<int64_t> choose(const std::vector<Item>& items, int64_t t) const {
    int64_t budget = kMaxTries;
    for (const int64_t offset : candidates(items, t)) {
      auto next = items;
      place(next, t, offset);
      if (is_possible(std::move(next), t + 1, slot_bytes_ > 0 ? 0 : 2 * lookahead_ + 1, budget))
        return offset;
    }
    return std::nullopt;
  }

  bool is_possible(std::vector<Item> items, int64_t t, int64_t depth, int64_t& budget) const {
    if (depth == 0) return true;
    if (Item* there = find(items, at(t))) {
      there->last = t;
      return is_possible(std::move(items), t + 1, depth - 1, budget);
    }
    for (const int64_t offset : candidates(items, t)) {
      if (--budget < 0) return false;
      auto next = items;
      place(next, t, offset);
      if (is_possible(std::move(next), t + 1, depth - 1, budget)) return true;
    }
    return false;
  }

  static constexpr int64_t kMaxTries = 2000;
  std::vector<int64_t> bytes_;
  std::span<const int64_t> cycle_;
  int64_t lookahead_, capacity_;
  int64_t slot_bytes_, num_slots_;   // places are multiples of it; 0: anywhere
  std::vector<int64_t> distance_{};  // by position in the cycle: to the record's next
};

/// One slot after the other, where no record comes again before all slots have been taken by others; nothing if one
/// does. Simulation would keep a few records of a thousand, and take a hundred times as long.
std::optional<RingPlan> in_turn(std::span<const int64_t> cycle,
                                int64_t slot_bytes,
                                int64_t num_slots,
                                int64_t capacity) {
  const auto length = static_cast<int64_t>(cycle.size());
  if (length <= num_slots || std::set<int64_t>(cycle.begin(), cycle.end()).size() != cycle.size())
    return std::nullopt;
  RingPlan plan{capacity, {}, 0};
  for (int64_t t = 0; t < std::lcm(length, num_slots); ++t)
    plan.placements.push_back({cycle[static_cast<size_t>(t % length)],
                               t % num_slots * slot_bytes,
                               /*load=*/true,
                               /*kept=*/false});
  return plan;
}

}  // namespace

const Placement& RingPlan::at(int64_t position) const {
  const auto p = static_cast<size_t>(position);
  return placements[p < placements.size() ? p : loop + (p - loop) % (placements.size() - loop)];
}

int64_t RingPlan::bytes_per_cycle(std::span<const int64_t> record_bytes,
                                  size_t cycle_length) const {
  int64_t total = 0;
  for (size_t i = loop; i < placements.size(); ++i)
    if (placements[i].load) total += record_bytes[static_cast<size_t>(placements[i].record)];
  return total * static_cast<int64_t>(cycle_length) /
         static_cast<int64_t>(placements.size() - loop);
}

RingPlan plan_ring(std::span<const int64_t> record_bytes,
                   std::span<const int64_t> cycle,
                   int64_t lookahead,
                   int64_t capacity,
                   RingSlots slots) {
  if (cycle.empty()) throw std::invalid_argument("plan_ring: no record in the cycle");
  if (lookahead < 1)
    throw std::invalid_argument(fmt::format("plan_ring: a lookahead of {}", lookahead));
  std::vector<int64_t> bytes;
  for (const int64_t length : record_bytes)
    bytes.push_back((length + kRecordAlignment - 1) / kRecordAlignment * kRecordAlignment);
  int64_t largest = 0;
  for (const int64_t record : cycle) {
    if (record < 0 || record >= static_cast<int64_t>(bytes.size()) ||
        bytes[static_cast<size_t>(record)] <= 0)
      throw std::invalid_argument(fmt::format("plan_ring: no record {}", record));
    largest = std::max(largest, bytes[static_cast<size_t>(record)]);
  }
  int64_t least = 0;  // different records of neighbouring positions
  for (size_t i = 0; i < cycle.size(); ++i) {
    std::set<int64_t> window;
    for (size_t k = 0; k <= static_cast<size_t>(lookahead); ++k)
      window.insert(cycle[(i + k) % cycle.size()]);
    int64_t sum = 0;
    for (const int64_t record : window) sum += bytes[static_cast<size_t>(record)];
    least = std::max(least, sum);
  }
  const int64_t most = largest * (lookahead + 1);
  constexpr int64_t kMaxTurns = 64;
  const auto anywhere = [&](int64_t room) {
    return Simulation(bytes, cycle, lookahead, room, 0, 0).run(kMaxTurns);
  };
  // finds places and repeats itself whatever the sizes are
  const auto in_slots = [&](int64_t room, int64_t num_slots) {
    return *Simulation(bytes, cycle, lookahead, room, largest, num_slots)
                .run(INT64_MAX / 2 / std::ssize(cycle));
  };
  const auto in_least_slots = [&](int64_t room) { return in_slots(room, lookahead + 1); };

  capacity = capacity / kRecordAlignment * kRecordAlignment;
  if (slots == RingSlots::kEqual && (capacity == 0 || capacity >= most)) {
    if (capacity == 0) capacity = most;
    const int64_t num_slots = capacity / largest;
    const auto plan = in_turn(cycle, largest, num_slots, capacity);
    return plan ? *plan : in_slots(capacity, num_slots);
  }
  if (capacity > 0) {
    std::optional<RingPlan> best;
    const auto consider = [&](std::optional<RingPlan> plan) {
      if (plan && (!best || plan->bytes_per_cycle(bytes, cycle.size()) <
                                best->bytes_per_cycle(bytes, cycle.size())))
        best = std::move(plan);
    };
    if (capacity >= least) consider(anywhere(capacity));
    if (!best && capacity >= least) {
      // a memory that leaves odd gaps: what would be done with a little less, or with equal slots
      for (int64_t part = 15; part >= 8; --part)
        if (const int64_t room = capacity / 16 * part / kRecordAlignment * kRecordAlignment;
            room >= least)
          consider(anywhere(room));
      if (const int64_t fitting = capacity / largest; fitting > lookahead) {
        consider(Simulation(bytes, cycle, lookahead, capacity, largest, fitting).run(kMaxTurns));
        consider(in_least_slots(capacity));
      }
    }
    if (!best)
      throw std::invalid_argument(
          fmt::format("plan_ring: records of a lookahead of {} need {} to {} bytes, there are {}",
                      lookahead,
                      least,
                      most,
                      capacity));
    best->capacity = capacity;
    return *best;
  }
  if (auto plan = anywhere(least)) return *plan;
  std::optional<RingPlan> best;
  int64_t low = least, high = most;
  for (int tries = 0; tries < 8 && low + kRecordAlignment < high; ++tries) {
    const int64_t middle = (low + high) / 2 / kRecordAlignment * kRecordAlignment;
    if (auto plan = anywhere(middle)) {
      best = std::move(plan);
      high = middle;
    } else {
      low = middle;
    }
  }
  return best ? *best : in_least_slots(most);
}

std::vector<int64_t> forward_and_back(std::span<const int64_t> records) {
  std::vector<int64_t> cycle(records.begin(), records.end());
  cycle.insert(cycle.end(), records.rbegin(), records.rend());
  return cycle;
}

}  // namespace flux::engine
