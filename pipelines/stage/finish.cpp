#include "pipelines/stage/finish.h"

#include <c10/core/Device.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <system_error>
#include <tuple>

#include "common/core/cancel.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/core/tool.h"

namespace flux::stage {

cache::Provenance begin(std::string_view tool,
                        std::string_view command_line,
                        const c10::Device& device) {
  cache::Provenance out{
      std::string(tool), std::string(tool_version()), std::string(command_line), device.str()};
  log::info("version {} device={} command: {}", out.tool_version, out.device, out.command_line);
  return out;
}

cache::Quarantined leave_out(const Sha256Digest& item,
                             uint32_t subset,
                             const std::string& path,
                             std::string_view message) {
  const std::string reason(message.substr(0, message.find('\n')));  // without its hint
  log::warn("{}: left out: {}", show(path), reason);
  return {item, subset, path, reason};
}

void quarantine(const std::vector<Failure>& failures, cache::Publication& publication) {
  std::map<Sha256Digest, const std::string*> reasons;
  for (const Failure& failure : failures) reasons[failure.key] = &failure.reason;
  std::erase_if(publication.items, [&](const cache::WantedItem& item) {
    for (const auto& variant : item.variants) {
      const auto reason = reasons.find(variant.key);
      if (reason == reasons.end()) continue;
      publication.quarantined.push_back(
          leave_out(item.item, item.subset, item.path, *reason->second));
      return true;
    }
    return false;
  });
  std::ranges::sort(publication.quarantined, {}, [](const cache::Quarantined& item) {
    return std::tuple(item.subset, item.path);
  });
}

void announce(const cache::Writer& writer, const cache::Comparison& comparison, Report& report) {
  report.encoded = comparison.new_samples + comparison.changed;
  report.kept = comparison.kept;
  report.changed = comparison.changed;
  report.unwanted = comparison.unwanted;
  if (writer.num_recovered() > 0) {
    log::info("an interrupted run had finished {} {}: they are kept",
              writer.num_recovered(),
              report.noun);
  }
  report.changed_by = comparison.changed_by;
  report.changed_fields = comparison.changed_fields;
  for (const std::string& field : comparison.changed_fields)
    log::info("changed since the last run: {}", field);
  for (const auto& [field, count] : comparison.changed_by)
    log::info("changed {}: {} with another {}", report.noun, count, field);
  log::info("to encode: {} {} (new={} changed={}) kept={} unwanted={}",
            report.encoded,
            report.noun,
            comparison.new_samples,
            comparison.changed,
            comparison.kept,
            comparison.unwanted);
}

void stop_if_asked(cache::Writer& writer, std::string_view noun) {
  const auto code = cancel::requested();
  if (!code) return;
  writer.seal();
  log::info("stopping: finished {} are kept; the same command goes on from here", noun);
  throw Interrupted(*code);
}

void finish(cache::Writer& writer,
            const cache::Publication& publication,
            int64_t max_failed,
            double start_seconds,
            Report& report) {
  report.failed = static_cast<int64_t>(publication.quarantined.size());
  if (report.failed > max_failed) {
    writer.seal();
    writer.withdraw(publication.quarantined);
    log::error(
        "{} {} failed, --max-failed allows {}: no manifest was written; the reasons are in "
        "quarantine.jsonl\n  hint: mend "
        "them, or allow them with --max-failed {}; what was encoded is kept",
        report.failed,
        report.failed == 1 ? "item" : "items",
        max_failed,
        report.failed);
    report.exit_code = ExitCode::kTooManyFailed;
  } else if (!writer.publish(publication)) {
    log::info("the cache is as it was; its manifest keeps its time");
  }
  report.seconds = monotonic_seconds() - start_seconds;
}

void add_times(const StageTimes& times, cache::Publication& publication) {
  publication.stage_seconds.update(times.seconds());
  if (const auto limit = times.limit(); !limit.empty()) {
    publication.notes["limit"] = limit;
    log::info(
        "the stage that limits is {}; busy seconds {}", limit, publication.stage_seconds.dump());
  }
}

double compressed_share(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return 0.68;
    case DType::kF16:
      return 0.86;
    default:
      return 0.84;
  }
}

void predict(const cache::Writer& writer,
             const std::filesystem::path& folder,
             int64_t num_samples,
             int64_t bytes,
             int64_t max_bytes) {
  const auto shown = [](int64_t count) { return show_bytes(static_cast<uint64_t>(count)); };
  const int64_t whole = writer.num_bytes() + bytes;
  log::info(
      "predicted: about {} for {} samples, {} in all", shown(bytes), num_samples, shown(whole));
  if (max_bytes > 0 && whole > max_bytes)
    log::warn("--max-bytes {} will not suffice: this run stops before it is done",
              shown(max_bytes));
  std::error_code error;
  const auto space = std::filesystem::space(folder, error);
  if (!error && static_cast<uint64_t>(bytes) > space.available)
    log::warn("{}: {} are free there, {} are needed",
              show(folder),
              show_bytes(space.available),
              shown(bytes));
}

double monotonic_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace flux::stage
