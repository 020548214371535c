#include "pipelines/check/report.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/core/text.h"
#include "common/tensor/tensor.h"

namespace flux::check {
namespace {

constexpr int64_t kSampleStride = 1000003;  // prime, so that the samples of a tensor are distinct

double ratio(double difference, double golden) {
  if (difference == 0) return 0;
  return difference / golden;  // infinite for zeros, NaN for NaN
}

std::string limited(const char* name, double error, const std::optional<double>& limit) {
  return limit ? fmt::format("  {} {:.1e} of {:.1e}", name, error, *limit)
               : fmt::format("  {} {:.1e}", name, error);
}

std::string joined(const std::set<std::string>& names) {
  return fmt::format("{}", fmt::join(names, ","));
}

}  // namespace

Errors errors_of(const at::Tensor& got, const at::Tensor& golden) {
  if (got.sizes() != golden.sizes()) {
    throw std::invalid_argument(
        fmt::format("shape {}, golden {}", shape_text(got), shape_text(golden)));
  }
  if (golden.numel() == 0) return {};
  const auto exact = golden.cpu().to(at::kDouble),
             difference = got.detach().cpu().to(at::kDouble) - exact;
  return {ratio(difference.norm().item<double>(), exact.norm().item<double>()),
          ratio(difference.abs().max().item<double>(), exact.abs().max().item<double>())};
}

at::Tensor samples_of(const at::Tensor& tensor, int64_t count) {
  const auto flat = tensor.detach().cpu().flatten();
  if (flat.numel() == 0) return flat;
  return flat.index_select(0,
                           (at::arange(count, at::kLong) * kSampleStride).remainder(flat.numel()));
}

void Report::start(std::string title, std::string kind) {
  title_ = std::move(title);
  kind_ = std::move(kind);
  num_in_case_ = 0;
  ++num_cases_;
}

void Report::add(std::string_view name, bool ok, const std::string& text, nlohmann::json entry) {
  ++num_in_case_;
  ++num_checked_;
  if (!ok) ++num_failed_;
  print_(fmt::format("{}: {}{}  {}", title_, printable(name), text, ok ? "ok" : "FAIL"));
  entry.update({{"case", title_}, {"kind", kind_}, {"tensor", printable(name)}, {"ok", ok}});
  results_.push_back(std::move(entry));
}

void Report::compare(std::string_view name,
                     const at::Tensor& got,
                     const at::Tensor& golden,
                     const Limits& limits) {
  if (got.sizes() != golden.sizes()) {
    verdict(name, false, fmt::format("shape {}, golden {}", shape_text(got), shape_text(golden)));
  } else {
    judge(name, errors_of(got, golden), limits);
  }
}

void Report::judge(std::string_view name, const Errors& errors, const Limits& limits) {
  const auto within = [](double error, const std::optional<double>& limit) {
    return !limit || error <= *limit;
  };  // NaN: no
  const bool ok = within(errors.rel, limits.rel) && within(errors.max, limits.max) &&
                  (limits.rel || limits.max);
  nlohmann::json entry{{"rel", errors.rel}, {"max", errors.max}};
  if (limits.rel) entry["rel_limit"] = *limits.rel;
  if (limits.max) entry["max_limit"] = *limits.max;
  add(name,
      ok,
      limited("rel", errors.rel, limits.rel) + limited("max", errors.max, limits.max),
      std::move(entry));
}

void Report::equal(std::string_view name, const at::Tensor& got, const at::Tensor& golden) {
  if (got.sizes() != golden.sizes() || got.scalar_type() != golden.scalar_type()) {
    verdict(name,
            false,
            fmt::format("{} {}, golden {} {}",
                        dtype_name(dtype_of(got)),
                        shape_text(got),
                        dtype_name(dtype_of(golden)),
                        shape_text(golden)));
    return;
  }
  const auto a = got.detach().cpu().contiguous(), b = golden.cpu().contiguous();
  const auto bytes = host_bytes(a), wanted = host_bytes(b);
  const bool same = std::equal(bytes.begin(), bytes.end(), wanted.begin(), wanted.end());
  verdict(name, same, same ? "exact" : "not equal");
}

void Report::verdict(std::string_view name, bool ok, std::string_view note) {
  add(name,
      ok,
      note.empty() ? "" : fmt::format("  {}", printable(note)),
      {{"note", printable(note)}});
}

void Report::error(std::string_view message) {
  ++num_errors_;
  ++num_in_case_;
  print_(fmt::format(
      "{}: cannot be checked: {}", title_, printable(message.substr(0, message.find('\n')))));
  results_.push_back(
      {{"case", title_}, {"kind", kind_}, {"error", printable(message)}, {"ok", false}});
}

void Report::skip_kind(const std::string& title, const std::string& kind) {
  skipped_.insert(kind);
  print_(fmt::format("{}: skipped: kind {} has no bf16 limits", title, printable(kind)));
}

void Report::unknown_kind(const std::string& title, const std::string& kind) {
  unknown_.insert(printable(kind));
  print_(fmt::format("{}: unknown kind '{}'", title, printable(kind)));
}

std::string Report::line() const {
  std::string out = fmt::format("cases={} tensors={} ok={} failed={}",
                                num_cases_,
                                num_checked_,
                                num_checked_ - num_failed_,
                                num_failed_);
  if (num_errors_ > 0) out += fmt::format(" errors={}", num_errors_);
  if (!skipped_.empty()) out += fmt::format(" skipped_kinds={}", joined(skipped_));
  if (!unknown_.empty()) out += fmt::format(" unknown_kinds={}", joined(unknown_));
  return out;
}

nlohmann::json Report::json() const {
  return {{"cases", num_cases_},
          {"tensors", num_checked_},
          {"failed", num_failed_},
          {"errors", num_errors_},
          {"skipped_kinds", skipped_},
          {"unknown_kinds", unknown_},
          {"results", results_}};
}

ExitCode Report::exit_code() const {
  if (num_failed_ > 0) return ExitCode::kDiffers;
  if (num_errors_ > 0) return ExitCode::kInput;
  return unknown_.empty() ? ExitCode::kOk : ExitCode::kTooManyFailed;
}

}  // namespace flux::check
