#include "common/data/batch_reader.h"

#include <fmt/format.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

namespace flux {

struct BatchReader::State {
  struct Slot {
    Batch batch;
    std::exception_ptr error;
  };
  using Epoch = std::vector<std::vector<Visit>>;

  State(const TrainingData& d, const ReaderOptions& o)
      : data(d), options(o), num_batches(d.num_batches()) {}

  void work();
  // The order of an epoch, made once. Called with the lock held; the first threads of an epoch wait
  // for it.
  std::shared_ptr<const Epoch> epoch(int64_t number);
  bool done() const { return stopping || claimed == end; }

  const TrainingData& data;
  const ReaderOptions options;
  const int64_t num_batches;  // an epoch
  // Batches are numbered through all epochs: epoch * num_batches + index. Turns are counted.
  int64_t start = 0, claimed = 0, consumed = 0, end = -1;
  int64_t number_of(int64_t turns) const { return start + turns * options.stride; }
  bool stopping = false;
  double wait_seconds = 0;
  std::map<int64_t, Slot> ready;
  std::map<int64_t, std::shared_ptr<const Epoch>> epochs;
  mutable std::mutex mutex;
  std::condition_variable room, arrived;
  std::vector<std::jthread> threads;
};

std::shared_ptr<const BatchReader::State::Epoch> BatchReader::State::epoch(int64_t number) {
  auto& order = epochs[number];
  if (!order) {
    order = std::make_shared<const Epoch>(data.epoch_batches(number));
    std::erase_if(
        epochs, [&](const auto& entry) { return entry.first < number_of(consumed) / num_batches; });
  }
  return order;
}

void BatchReader::State::work() {
  std::unique_lock lock(mutex);
  while (true) {
    room.wait(lock, [&] { return done() || claimed < consumed + options.num_ahead; });
    if (done()) return;
    const int64_t turn = claimed++;
    const int64_t number = number_of(turn) + options.turn;
    Slot slot;
    try {
      const auto order = epoch(number / num_batches);
      lock.unlock();
      const int64_t index = number % num_batches;
      slot.batch = data.load(number / num_batches, index, order->at(static_cast<size_t>(index)));
    } catch (...) {
      slot.error = std::current_exception();
    }
    if (!lock.owns_lock()) lock.lock();
    ready.emplace(turn, std::move(slot));
    arrived.notify_all();
  }
}

BatchReader::BatchReader(const TrainingData& data, DataPosition start, const ReaderOptions& options)
    : state_(std::make_unique<State>(data, options)) {
  State& s = *state_;
  if (start.epoch < 0 || start.batch < 0 || start.batch >= s.num_batches) {
    throw std::invalid_argument(fmt::format("position epoch {} batch {}, an epoch has {} batches",
                                            start.epoch,
                                            start.batch,
                                            s.num_batches));
  }
  s.start = start.epoch * s.num_batches + start.batch;
  if (options.num_batches >= 0) s.end = options.num_batches;
  for (int64_t i = 0; i < std::max<int64_t>(options.num_threads, 1); ++i)
    s.threads.emplace_back([&s] { s.work(); });
}

BatchReader::~BatchReader() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->room.notify_all();
  state_->threads.clear();  // joins
}

Batch BatchReader::next() {
  State& s = *state_;
  const auto start = std::chrono::steady_clock::now();
  std::unique_lock lock(s.mutex);
  if (s.consumed == s.end) throw std::out_of_range("all batches were read");
  s.arrived.wait(lock, [&] { return s.ready.contains(s.consumed); });
  State::Slot slot = std::move(s.ready.extract(s.consumed).mapped());
  ++s.consumed;
  s.wait_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  lock.unlock();
  s.room.notify_all();
  if (slot.error) std::rethrow_exception(slot.error);
  return std::move(slot.batch);
}

DataPosition BatchReader::position() const {
  const std::lock_guard lock(state_->mutex);
  const int64_t number = state_->number_of(state_->consumed);
  return {number / state_->num_batches, number % state_->num_batches};
}

std::vector<BatchOutline> BatchReader::outline(int64_t count) const {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  std::vector<BatchOutline> out;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number = s.number_of(s.consumed) + i, epoch = number / s.num_batches;
    out.push_back(
        s.data.outline(epoch, s.epoch(epoch)->at(static_cast<size_t>(number % s.num_batches))));
  }
  return out;
}

double BatchReader::wait_seconds() const {
  const std::lock_guard lock(state_->mutex);
  return state_->wait_seconds;
}

}  // namespace flux
