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

namespace flux {

/// Calls make(0), make(1), ... make(count - 1) in `num_threads` threads, never more than `ahead`
/// beyond what was taken, so that finished work waits in bounded memory.
template <class T>
class Ordered {
 public:
  Ordered(int64_t count, int num_threads, int64_t ahead, std::function<T(int64_t)> make)
      : count_(count), ahead_(ahead), make_(std::move(make)) {
    for (int t = 0; t < num_threads; ++t) threads_.emplace_back([this] { work(); });
  }
  ~Ordered() {
    {
      const std::lock_guard guard(lock_);
      stop_ = true;
    }
    changed_.notify_all();
  }

  /// The next result. Rethrows what make() threw for it. Call it at most `count` times.
  T take() {
    std::unique_lock guard(lock_);
    changed_.wait(guard, [this] { return done_.contains(taken_) || failure_; });
    if (failure_) std::rethrow_exception(failure_);
    auto node = done_.extract(taken_++);
    changed_.notify_all();
    return std::move(node.mapped());
  }

 private:
  void work() {
    std::unique_lock guard(lock_);
    for (;;) {
      changed_.wait(guard, [this] {
        return stop_ || failure_ || started_ == count_ || started_ < taken_ + ahead_;
      });
      if (stop_ || failure_ || started_ == count_) return;
      const int64_t index = started_++;
      guard.unlock();
      std::optional<T> result;
      std::exception_ptr failure;
      try {
        result = make_(index);
      } catch (...) {
        failure = std::current_exception();
      }
      guard.lock();
      if (failure) failure_ = failure;
      if (result) done_.emplace(index, std::move(*result));
      changed_.notify_all();
    }
  }

  const int64_t count_, ahead_;
  std::function<T(int64_t)> make_;
  std::mutex lock_;
  std::condition_variable changed_;
  std::map<int64_t, T> done_;
  int64_t started_ = 0, taken_ = 0;
  bool stop_ = false;
  std::exception_ptr failure_;
  std::vector<std::jthread> threads_;  // last: they stop before the rest goes
};

}  // namespace flux
