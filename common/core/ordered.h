// common/core/ordered.h - work done ahead in threads, taken in order.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "common/core/threads.h"

namespace flux {

/// Bytes that work and its results may hold together. One item may exceed it, alone.
struct MemoryBudget {
  int64_t bytes = INT64_MAX;
  std::function<int64_t(int64_t)> working{};  // what item i holds while it is made
  std::function<int64_t(int64_t)> waiting{};  // what its result holds
};

/// Calls make(0), make(1), ... make(count - 1) in `num_threads` threads (or as many as the system
/// gives), never more than `ahead` beyond what was taken and within `budget`, so that finished work
/// waits in bounded memory. Throws ResourceError if no thread can be started.
template <class T>
class Ordered {
 public:
  Ordered(int64_t count,
          int num_threads,
          int64_t ahead,
          std::function<T(int64_t)> make,
          MemoryBudget budget = {})
      : count_(count), ahead_(ahead), make_(std::move(make)), budget_(std::move(budget)) {
    threads_ = start_threads(num_threads, [this] { work(); });
  }
  ~Ordered() {
    {
      const std::lock_guard guard(lock_);
      stop_ = true;
    }
    changed_.notify_all();
  }

  /// The next result. Rethrows what make() threw for it, after all earlier results were taken. Call
  /// it at most `count` times.
  T take() {
    std::unique_lock guard(lock_);
    changed_.wait(guard, [this] { return done_.contains(taken_) || failures_.contains(taken_); });
    if (const auto failure = failures_.find(taken_); failure != failures_.end())
      std::rethrow_exception(failure->second);
    auto node = done_.extract(taken_);
    held_bytes_ -= bytes(budget_.waiting, taken_++);
    changed_.notify_all();
    return std::move(node.mapped());
  }

 private:
  static int64_t bytes(const std::function<int64_t(int64_t)>& of, int64_t index) {
    return of ? of(index) : 0;
  }
  bool may_start() const {
    if (started_ == taken_) return true;
    return started_ < taken_ + ahead_ &&
           held_bytes_ <= budget_.bytes - bytes(budget_.working, started_);
  }
  // Items are started in order, so all before a failed one are made too.
  bool ends() const { return stop_ || !failures_.empty() || started_ == count_; }

  void work() {
    std::unique_lock guard(lock_);
    for (;;) {
      changed_.wait(guard, [this] { return ends() || may_start(); });
      if (ends()) return;
      const int64_t index = started_++;
      held_bytes_ += bytes(budget_.working, index);
      guard.unlock();
      std::optional<T> result;
      std::exception_ptr failure;
      try {
        result = make_(index);
      } catch (...) {
        failure = std::current_exception();
      }
      guard.lock();
      held_bytes_ += bytes(budget_.waiting, index) - bytes(budget_.working, index);
      if (failure) failures_.emplace(index, failure);
      if (result) done_.emplace(index, std::move(*result));
      changed_.notify_all();
    }
  }

  const int64_t count_, ahead_;
  std::function<T(int64_t)> make_;
  const MemoryBudget budget_;
  std::mutex lock_;
  std::condition_variable changed_;
  std::map<int64_t, T> done_;
  std::map<int64_t, std::exception_ptr> failures_;
  int64_t started_ = 0, taken_ = 0, held_bytes_ = 0;
  bool stop_ = false;
  std::vector<std::jthread> threads_;  // last: they stop before the rest goes
};

}  // namespace flux
