#include "pipelines/train/time_limit.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <optional>
#include <string_view>
#include <vector>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::train {
namespace {

constexpr double kSaveFactor = 1.5, kFirstSaveBytesPerSecond = 100e6;
/// Report, leaving the other ranks, giving back memory, and whatever was slower than measured: a share of the limit.
constexpr double kEndShare = 0.02, kEndLeast = 2, kEndMost = 30;
constexpr double kMost = 10.0 * 366 * 24 * 3600;

std::optional<double> number_of(std::string_view text, bool whole) {
  double value = 0;
  const char* const end = text.data() + text.size();
  if (text.empty() || text.find_first_not_of(whole ? "0123456789" : "0123456789.") != text.npos)
    return std::nullopt;
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || value > kMost) return std::nullopt;
  return value;
}

/// "1-12:30:00" and shorter; nothing for other texts.
std::optional<double> slurm_duration(std::string_view text) {
  const size_t dash = text.find('-');
  const bool has_days = dash != text.npos;
  double total = 0;
  if (has_days) {
    const auto days = number_of(text.substr(0, dash), true);
    if (!days) return std::nullopt;
    total = *days * 86400;
    text.remove_prefix(dash + 1);
  }
  const auto parts = split(text, ':');
  if (parts.size() > 3 || (!has_days && parts.size() < 2)) return std::nullopt;
  // after days, and of three, hours come first; of two, minutes
  constexpr std::array<double, 3> kUnits{3600, 60, 1};
  const size_t first = has_days || parts.size() == 3 ? 0 : 1;
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto value = number_of(parts[i], true);
    if (!value) return std::nullopt;
    total += *value * kUnits[first + i];
  }
  return total;
}

/// "1h30m"
std::optional<double> duration_in_units(std::string_view text) {
  static const std::vector<std::pair<std::string_view, double>> kUnits{// longer names first
                                                                       {"days", 86400},
                                                                       {"day", 86400},
                                                                       {"d", 86400},
                                                                       {"hours", 3600},
                                                                       {"hour", 3600},
                                                                       {"hrs", 3600},
                                                                       {"hr", 3600},
                                                                       {"h", 3600},
                                                                       {"minutes", 60},
                                                                       {"minute", 60},
                                                                       {"mins", 60},
                                                                       {"min", 60},
                                                                       {"m", 60},
                                                                       {"seconds", 1},
                                                                       {"second", 1},
                                                                       {"secs", 1},
                                                                       {"sec", 1},
                                                                       {"s", 1}};
  double total = 0, above = INFINITY;
  while (!text.empty()) {
    const size_t digits = std::min(text.find_first_not_of("0123456789."), text.size());
    const auto value = number_of(text.substr(0, digits), false);
    text = trim(text.substr(digits));
    const auto unit = std::ranges::find_if(
        kUnits, [&](const auto& known) { return text.starts_with(known.first); });
    if (!value || unit == kUnits.end() || unit->second >= above) return std::nullopt;
    above = unit->second;
    total += *value * unit->second;
    text = trim(text.substr(unit->first.size()));
  }
  return total;
}

}  // namespace

double parse_duration(const std::string& text) {
  const std::string word = lower_ascii(trim(text));
  if (word == "unlimited" || word == "infinite") return 0;  // of squeue
  const auto seconds =
      word.find_first_of(":-") != word.npos ? slurm_duration(word) : duration_in_units(word);
  if (word.empty() || !seconds)
    throw UsageError("'" + printable(text) +
                     "' is no time such as 4h, 1h30m, 90min, 45s, 04:00:00 or 1-12:00:00");
  if (*seconds <= 0 || *seconds > kMost)
    throw UsageError("'" + printable(text) + "' is not above 0 and at most 10 years");
  return *seconds;
}

TimeLimit::TimeLimit(double limit, uint64_t checkpoint_bytes)
    : limit_(limit), save_(static_cast<double>(checkpoint_bytes) / kFirstSaveBytesPerSecond) {}

void TimeLimit::step_took(double seconds) { step_ = std::max(step_, seconds); }

void TimeLimit::save_took(double seconds) {
  save_ = measured_ ? std::max(save_, seconds) : seconds;
  measured_ = true;
}

double TimeLimit::reserve() const {
  const double end = std::clamp(kEndShare * limit_, kEndLeast, kEndMost);
  return (measured_ ? kSaveFactor * save_ : save_) + end;
}

bool TimeLimit::ends(double now) const { return limit_ > 0 && now + step_ + reserve() > limit_; }

std::string TimeLimit::describe(double now) const {
  return fmt::format(
      "--time-limit: {:.1f} s of {:.1f} are over; a step takes up to {:.1f} s, a save {} {:.1f} s",
      now,
      limit_,
      step_,
      measured_ ? "up to" : "perhaps",
      save_);
}

}  // namespace flux::train
