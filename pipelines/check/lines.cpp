#include "pipelines/check/lines.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"

namespace flux::check {
namespace {

constexpr uint64_t kMaxBytes = 256 << 20;
constexpr size_t kMaxExamples = 3;

}  // namespace

void Tally::add(bool same, const std::string& name, const std::string& why) {
  ++num_;
  if (same) return;
  ++num_wrong_;
  if (examples_.size() < kMaxExamples)
    examples_.push_back(why.empty() ? name : fmt::format("{}: {}", name, why));
}

void Tally::report(Report& report, const std::string& name, const std::string& what) const {
  if (num_ == 0) return report.verdict(name, false, "holds nothing that can be checked");
  std::string note = fmt::format("{} of {} {} equal", num_ - num_wrong_, num_, what);
  if (num_wrong_ > 0) note += fmt::format("; not: {}", fmt::join(examples_, ", "));
  report.verdict(name, num_wrong_ == 0, note);
}

nlohmann::json read_object(const std::filesystem::path& file) {
  auto json = nlohmann::json::parse(read_file(file, kMaxBytes), nullptr, false);
  if (!json.is_object()) throw InputError(fmt::format("{}: not a JSON object", show(file)));
  return json;
}

void for_each_line(const Case& c,
                   const std::string& file,
                   const std::function<void(const nlohmann::json& line)>& take) {
  const std::string text = read_file(c.folder / file, kMaxBytes);
  size_t number = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    ++number;
    const std::string_view line = std::string_view(text).substr(at, end - at);
    at = end + 1;
    if (trim(line).empty()) continue;
    const auto json = nlohmann::json::parse(line, nullptr, false);
    if (!json.is_object())
      throw InputError(
          fmt::format("{}: line {} is not a JSON object", show(c.folder / file), number));
    take(json);
  }
}

}  // namespace flux::check
