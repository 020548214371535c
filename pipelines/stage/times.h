// pipelines/stage/times.h - how busy each stage of a pipeline is, and which one limits it.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace flux::stage {

/// The work of one stage ("decode"), done by one or more threads. Thread-safe.
class StageTime {
 public:
  StageTime(std::string name, int num_threads)
      : name_(std::move(name)), num_threads_(num_threads) {}

  /// Counts the time until it goes out of scope as work of the stage.
  class Scope {
   public:
    explicit Scope(StageTime& stage) : stage_(stage), start_(Clock::now()) {}
    ~Scope() { stage_.count(Clock::now() - start_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    StageTime& stage_;
    std::chrono::steady_clock::time_point start_;
  };

  /// Counts work that is over.
  void count(std::chrono::nanoseconds work) { nanoseconds_ += work.count(); }

  const std::string& name() const { return name_; }
  int num_threads() const { return num_threads_; }
  /// Summed over the threads.
  double busy_seconds() const { return static_cast<double>(nanoseconds_) * 1e-9; }

 private:
  using Clock = std::chrono::steady_clock;
  std::string name_;
  int num_threads_;
  std::atomic<int64_t> nanoseconds_{0};
};

/// All stages of a run. Stages keep their address.
class StageTimes {
 public:
  StageTime& add(std::string name, int num_threads = 1);
  /// Stage -> seconds that its threads were busy, summed over them; in microseconds' precision.
  nlohmann::json seconds() const;
  /// The stage whose threads are busiest: making any other one faster makes nothing faster.
  std::string limit() const;
  /// For the progress line: "limited by encode (decode 12%, encode 97%, write 1%)": the
  /// share of the time since the first add() that each thread of a stage was busy.
  std::string progress() const;

 private:
  std::chrono::steady_clock::time_point start_;
  std::deque<StageTime> stages_;
};

}  // namespace flux::stage
