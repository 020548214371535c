#include "pipelines/stage/finish.h"

#include <c10/core/Device.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <span>
#include <system_error>
#include <tuple>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "formats/cache/files.h"

namespace flux::stage {

cache::Provenance begin(std::string_view tool,
                        std::string_view command_line,
                        const c10::Device& device) {
  cache::Provenance out{
      std::string(tool), std::string(tool_version()), std::string(command_line), device.str()};
  log::info("version {} device={} command: {}", out.tool_version, out.device, out.command_line);
  return out;
}

std::string reason_of(std::string_view message, const std::filesystem::path& folder) {
  std::string reason(message.substr(0, message.find('\n')));
  if (folder.empty()) return reason;
  const size_t quote = reason.starts_with('\'') ? 1 : 0;  // as show() writes blanks
  const auto prefix = printable((folder / "").native());
  if (!std::string_view(reason).substr(quote).starts_with(prefix)) return reason;
  reason.erase(0, quote + prefix.size());
  // without quotes, which may be there for the folder's sake
  if (const auto end = reason.find("': "); quote > 0 && end != std::string::npos)
    reason.erase(end, 1);
  return reason;
}

cache::Quarantined leave_out(const Sha256Digest& item,
                             uint32_t subset,
                             const std::string& path,
                             const std::string& reason) {
  log::warn("{}: left out: {}", show(path), reason);
  return {item, subset, path, reason};
}

void discount(const std::vector<Failure>& failures,
              const cache::Writer& writer,
              const cache::Publication& publication,
              Report& report) {
  if (failures.empty()) return;
  std::map<Sha256Digest, const cache::SampleInfo*> infos;
  for (const Failure& failure : failures) infos[failure.info.key] = &failure.info;
  std::vector<cache::WantedItem> items;
  for (cache::WantedItem item : publication.items) {
    std::erase_if(item.variants, [&](const auto& variant) { return !infos.contains(variant.key); });
    if (!item.variants.empty()) items.push_back(std::move(item));
  }
  const auto failed =
      writer.compare(items, nullptr, [&](const Sha256Digest& key) { return *infos.at(key); });
  report.changed -= failed.changed;
  for (const auto& [field, count] : failed.changed_by) {
    auto& of_all = report.changed_by.at(field);
    of_all = of_all.get<int64_t>() - count;
    if (of_all == 0) report.changed_by.erase(field);
  }
}

void quarantine(const std::vector<Failure>& failures, cache::Publication& publication) {
  std::map<Sha256Digest, const std::string*> reasons;
  for (const Failure& failure : failures) reasons[failure.info.key] = &failure.reason;
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
  if (!writer.can_write())
    log::info("nothing can be written into the folder of the cache: it is compared only");
  if (writer.num_recovered() > 0) {
    log::info("an interrupted run had finished {}: kept",
              count_of(writer.num_recovered(), report.noun));
  }
  report.changed_by = comparison.changed_by;
  report.changed_fields = comparison.changed_fields;
  for (const std::string& field : comparison.changed_fields)
    log::info("changed since the last run: {}", field);
  for (const auto& [field, count] : comparison.changed_by)
    log::info("changed: {} with another {}", count_of(count, report.noun), field);
  log::info("to encode: {} (new={} changed={}) kept={} unwanted={}",
            count_of(report.encoded, report.noun),
            comparison.new_samples,
            comparison.changed,
            comparison.kept,
            comparison.unwanted);
  if (report.encoded > 0) writer.require_writable();
}

void stop_if_asked(cache::Writer& writer, std::string_view noun) {
  const auto code = cancel::requested();
  if (!code) return;
  writer.seal();
  log::info("stopping: finished {} are kept; the same command goes on from here", noun);
  throw Interrupted(*code);
}

void require_same_use(const std::filesystem::path& folder,
                      const std::optional<cache::Manifest>& previous,
                      const nlohmann::json& plan,
                      const cache::Shard& shard) {
  if (!previous) return;
  const auto use = [](const nlohmann::json& of) {
    return of.value("kind", nlohmann::json()) == "prompts" ? "prompts" : "captions of a data set";
  };
  if (const auto* before = use(previous->plan), *now = use(plan);
      std::string_view(before) != std::string_view(now)) {
    throw CacheError(
        fmt::format("{}: is a cache of {}, this run writes {}", show(folder), before, now),
        "give each a folder of its own");
  }
  if (shard.count == 1 || shard == previous->shard) return;
  const auto name = [](const cache::Shard& of) {
    return of.count == 1 ? std::string("a whole cache")
                         : fmt::format("part {}/{}", of.index, of.count);
  };
  throw CacheError(fmt::format("{}: holds {}, this run would make it {}",
                               show(folder),
                               name(previous->shard),
                               name(shard)),
                   "give each part a folder of its own, and join them with flux-cache merge");
}

namespace {

// Of this run if it encoded something, else what an unpublished run left, else the manifest's.
nlohmann::json last_encoding_run(const std::filesystem::path& folder,
                                 const cache::Writer& writer,
                                 const Timing& timing,
                                 const Report& report) {
  if (report.encoded > 0) return last_run(timing, report);
  const std::string rate = report.noun + "_per_second";
  nlohmann::json out = nlohmann::json::object();
  const auto take = [&](const nlohmann::json& from) {
    if (!from.is_object()) return;
    const auto seconds = from.find("stage_seconds"), limit = from.find("limit"),
               speed = from.find(rate);
    if (seconds != from.end() && seconds->is_object()) out["stage_seconds"] = *seconds;
    if (limit != from.end() && limit->is_string()) out["limit"] = *limit;
    if (speed != from.end() && speed->is_number()) out[rate] = *speed;
  };
  std::error_code error;
  if (std::filesystem::exists(folder / cache::kLastRunName, error)) {
    constexpr uint64_t kMaxBytes = 1 << 16;
    try {
      take(nlohmann::json::parse(
          read_file(folder / cache::kLastRunName, kMaxBytes), nullptr, false));
    } catch (const InputError& unreadable) {
      log::debug("{}", unreadable.what());
    }
  }
  if (out.empty() && writer.previous()) take(writer.previous()->provenance);
  return out;
}

}  // namespace

nlohmann::json last_run(const Timing& timing, const Report& report) {
  nlohmann::json seconds = timing.before;
  seconds.update(timing.stages.seconds());
  const double elapsed = monotonic_seconds() - timing.start_seconds;
  return {{"stage_seconds", seconds},
          {"limit", timing.stages.limit()},
          {report.noun + "_per_second",
           elapsed > 0 ? static_cast<double>(report.encoded) / elapsed : 0}};
}

void keep_last_run(const std::filesystem::path& folder, const nlohmann::json& last_run) {
  write_file_if_changed(folder / cache::kLastRunName, last_run.dump() + "\n");
}

void finish(const EncodeOptions& options,
            cache::Writer& writer,
            cache::Publication& publication,
            const Timing& timing,
            Report& report) {
  const auto run = last_encoding_run(options.out, writer, timing, report);
  if (report.encoded > 0) {
    log::info("the stage that limits is {}; busy seconds {}",
              timing.stages.limit(),
              run.at("stage_seconds").dump());
  }
  const bool nothing_left = std::ranges::none_of(publication.items, [](const auto& item) {
    return (item.flags & cache::kItemEmptyCaption) == 0;
  });
  report.failed = static_cast<int64_t>(publication.quarantined.size());
  const bool withdraw = report.failed > options.max_failed || nothing_left;
  writer.seal();
  if (!run.empty() && (withdraw || report.encoded > 0)) keep_last_run(options.out, run);
  if (withdraw) {
    writer.withdraw(publication.quarantined);
    const auto failed = count_of(report.failed, "items");
    if (report.failed > options.max_failed) {
      log::error(
          "{} failed, --max-failed allows {}: no manifest was written; the reasons are in "
          "quarantine.jsonl\n  hint: mend them, or allow them with --max-failed {}; what was "
          "encoded is kept",
          failed,
          options.max_failed,
          report.failed);
    } else {
      log::error(
          "{} failed, and none is left: no manifest was written; the reasons are in "
          "quarantine.jsonl\n  hint: mend them: a cache without items is of no use",
          failed);
    }
    report.exit_code = ExitCode::kTooManyFailed;
  } else {
    publication.notes.update(run);  // its stage_seconds too
    if (!writer.publish(publication))
      log::info("the cache is as it was; its manifest keeps its time");
    std::error_code ignored;  // a newer run writes it again
    std::filesystem::remove(options.out / cache::kLastRunName, ignored);
  }
  report.seconds = monotonic_seconds() - timing.start_seconds;
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

std::vector<size_t> measured_places(size_t count) {
  constexpr size_t kMost = 4;
  std::vector<size_t> places;
  const size_t some = std::min(count, kMost);
  for (size_t i = 0; i < some; ++i) places.push_back(i * count / some);
  return places;
}

void Measurement::add(EncodedSample sample) {
  const std::vector<std::span<const std::byte>> tensors(sample.tensors.begin(),
                                                        sample.tensors.end());
  for (const auto& frame : cache::prepare(layout_, sample.info, tensors).frames)
    bytes_ += static_cast<int64_t>(frame.size());
}

void Measurement::stop_if_asked() { cancel::check(); }

int64_t predict(const cache::Writer& writer,
                const EncodeOptions& options,
                int64_t num_samples,
                double raw_bytes,
                double share) {
  // measured: HDF5's own structures of a segment, and a sample's row in its tables
  constexpr int64_t kSegmentBytes = 8 << 10, kRowBytes = 128;
  const int64_t segments =
      (num_samples + cache::kMaxSegmentSamples - 1) / cache::kMaxSegmentSamples;
  const int64_t bytes =
      static_cast<int64_t>(raw_bytes * share) + segments * kSegmentBytes + num_samples * kRowBytes;
  const auto shown = [](int64_t count) { return show_bytes(static_cast<uint64_t>(count)); };
  const int64_t whole = writer.num_bytes() + bytes;
  log::info("predicted: about {} for {}, {} in all",
            shown(bytes),
            count_of(num_samples, "samples"),
            shown(whole));
  if (options.max_bytes > 0 && whole > options.max_bytes)
    log::warn("--max-bytes {} will not suffice: this run stops before it is done",
              shown(options.max_bytes));
  std::error_code error;
  const auto space = std::filesystem::space(options.out, error);
  if (!error && static_cast<uint64_t>(bytes) > space.available)
    log::warn("{}: {} are free there, {} are needed",
              show(options.out),
              show_bytes(space.available),
              shown(bytes));
  return bytes;
}

double monotonic_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace flux::stage
