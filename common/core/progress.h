// common/core/progress.h - how far long work is: count, rate and remaining time on stderr.
#pragma once
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

namespace flux {

/// Redraws one line on a terminal at most six times a second, else logs a line a minute.
class Progress {
 public:
  /// `unit` is the plural of what is counted, "images" for one; `total` 0 = not known.
  Progress(std::string label, std::string unit, int64_t total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// `done` units of the total are finished; `detail` is shown after the numbers ("loss 0.41").
  void update(int64_t done, std::string_view detail = {});
  double seconds() const;

 private:
  using Clock = std::chrono::steady_clock;
  std::string label_, unit_;
  int64_t total_;
  Clock::time_point start_, last_;
  bool drawn_ = false;
};

}  // namespace flux
