// pipelines/train/time_limit.h - stopping early enough before --time-limit.
#pragma once
#include <cstdint>
#include <string>

namespace flux::train {

/// Seconds of "4h", "1h30m", "90min", "2d12h", "45s", "4 hours", and of what Slurm writes: "4:00:00", "1-12:00:00",
/// "1-12", "1-12:30", "30:00" (minutes and seconds); "unlimited" is 0. Throws UsageError for anything else, and for a
/// number without unit.
double parse_duration(const std::string& text);

/// Decides when a run has to save in order to be done before its limit. All times are seconds, of the process since its
/// start.
///
/// Another step begins only if one as long as the longest so far, a save and the end of the program fit. A save is
/// taken for half as long again as the longest so far; the first one, which nothing is known of, for its bytes at
/// 100 MB/s. The end has 2 % of the limit, at least 2 s and at most 30 s.
class TimeLimit {
 public:
  /// `limit` 0: none.
  TimeLimit(double limit, uint64_t checkpoint_bytes);

  void step_took(double seconds);
  void save_took(double seconds);
  /// What is kept for a save and the end of the program.
  double reserve() const;
  /// From when on only the save may begin, no matter what is at work.
  double deadline() const { return limit_ - reserve(); }
  /// Whether another step does not fit.
  bool ends(double now) const;
  /// "--time-limit 300 s: ..." with what was measured.
  std::string describe(double now) const;

 private:
  double limit_, step_ = 0, save_;
  bool measured_ = false;
};

}  // namespace flux::train
