// pipelines/check/report.h - how two tensors are compared, and the lines and totals that come of
// it.
#pragma once
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>

#include "common/core/error.h"
#include "common/tensor/fwd.h"

namespace flux::check {

/// Largest errors allowed; what is absent is not judged.
///   rel  l2 norm of the difference / l2 norm of the golden tensor
///   max  largest absolute difference / largest absolute golden value
struct Limits {
  std::optional<double> rel, max;
};

struct Errors {
  double rel = 0, max = 0;
};
/// Computed in float64 on the CPU; 0 for equal tensors, infinite against a golden tensor of zeros,
/// NaN for NaN. Throws std::invalid_argument if the shapes differ.
Errors errors_of(const at::Tensor& got, const at::Tensor& golden);

/// Elements (j * 1000003) mod numel of the flattened tensor for j = 0 .. count-1: how big golden
/// tensors are kept.
at::Tensor samples_of(const at::Tensor& tensor, int64_t count);

/// Collects verdicts; each is shown as one line when it is made.
class Report {
 public:
  using Print = std::function<void(const std::string& line)>;
  explicit Report(Print print) : print_(std::move(print)) {}

  /// All that follows belongs to this case.
  void start(std::string title, std::string kind);
  /// Verdicts in the current case so far.
  int64_t num_in_case() const { return num_in_case_; }

  /// One tensor against its golden values, within `limits`.
  void compare(std::string_view name,
               const at::Tensor& got,
               const at::Tensor& golden,
               const Limits& limits);
  /// Errors computed elsewhere.
  void judge(std::string_view name, const Errors& errors, const Limits& limits);
  /// Shape and every element (bits for floats).
  void equal(std::string_view name, const at::Tensor& got, const at::Tensor& golden);
  /// Anything else; `note` says what was found.
  void verdict(std::string_view name, bool ok, std::string_view note);
  /// The current case cannot be judged: the user's file or vocabulary is missing or broken.
  void error(std::string_view message);
  void skip_kind(const std::string& title, const std::string& kind);
  void unknown_kind(const std::string& title, const std::string& kind);

  int64_t num_failed() const { return num_failed_; }
  int64_t num_checked() const { return num_checked_; }
  /// "1234 of 1234 tensors within their limits ..." and the same as an object with all results.
  std::string line() const;
  nlohmann::json json() const;
  ExitCode exit_code() const;

 private:
  void add(std::string_view name, bool ok, const std::string& text, nlohmann::json entry);

  Print print_;
  std::string title_, kind_;
  int64_t num_cases_ = 0, num_in_case_ = 0, num_checked_ = 0, num_failed_ = 0, num_errors_ = 0;
  std::set<std::string> skipped_, unknown_;
  nlohmann::json results_ = nlohmann::json::array();
};

}  // namespace flux::check
