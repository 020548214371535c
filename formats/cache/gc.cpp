#include "formats/cache/gc.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <system_error>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/folder.h"
#include "formats/cache/header.h"
#include "formats/cache/journal.h"
#include "formats/cache/lock.h"
#include "formats/cache/segment_reader.h"

namespace flux::cache {
namespace fs = std::filesystem;
namespace {

int64_t file_bytes(const fs::path& path) {
  std::error_code error;
  const auto bytes = fs::file_size(path, error);
  return error ? 0 : static_cast<int64_t>(bytes);
}

int64_t bytes_of(const fs::path& folder) {
  int64_t bytes = 0;
  for (const auto& name : names_in(folder)) {
    if (is_file_of_cache(name)) bytes += file_bytes(folder / name);
  }
  return bytes;
}

// What happens to the files of one folder.
struct Plan {
  std::map<std::string, std::vector<int64_t>> rewrite;  // segment -> its wanted rows
  std::vector<std::string> remove;                      // segments that hold nothing wanted
  std::vector<std::string> others;                      // journals, temporary files, locks
};

}  // namespace

GcReport collect_garbage(const fs::path& folder,
                         bool dry_run,
                         const std::function<void(int64_t, int64_t)>& progress) {
  require_folder(folder);
  refuse_foreign_files(folder);
  if (!has_unfinished_publication(folder))
    read_manifest(folder);  // throws before anything is made in a folder that is no cache
  require_no_readers(folder);
  std::optional<WriterLock> lock;
  if (!dry_run) {
    lock.emplace(folder);
    finish_publication(folder);
  }
  Folder state;
  state.folder = folder;
  state.previous = read_manifest(folder);
  state.recipe = state.previous->recipe;
  state.shard = state.previous->shard;
  const Manifest manifest = *state.previous;
  state.previous_index = read_index_of(folder, manifest);

  GcReport report;
  report.kept_samples = manifest.num_samples;
  report.bytes_before = bytes_of(folder);
  std::map<std::string, std::set<int64_t>> wanted;  // segment -> rows
  for (const auto& entry : manifest.segments) wanted[entry.name];
  for (const auto& variant : state.previous_index.variants()) {
    if (variant.segment == kOtherShard) continue;
    wanted[manifest.segments[variant.segment].name].insert(variant.row);
  }

  // segments are looked into, and some are read and written
  int64_t total = 0, done = 0;
  const auto names = names_in(folder);
  for (const auto& name : names) total += is_segment_name(name) ? file_bytes(folder / name) : 0;
  const auto advance = [&](int64_t bytes) {
    done += bytes;
    if (progress) progress(done, total);
  };
  Plan plan;
  int64_t freed = 0;
  for (const auto& name : names) {
    const fs::path path = folder / name;
    if (is_temporary_name(name) || is_reader_lock_name(name)) {
      plan.others.push_back(name);
      freed += file_bytes(path);
    } else if (is_journal_name(name)) {
      plan.others.push_back(name);
      freed += file_bytes(path);
      report.removed_samples += std::ssize(parse_journal(MappedFile(path).bytes(), path).records);
    }
    if (!is_segment_name(name)) continue;
    advance(file_bytes(path));
    const auto rows = wanted.find(name);
    std::optional<Segment> segment;
    try {
      segment.emplace(path);
    } catch (const SchemaError&) {
      throw;
    } catch (const CacheError& failure) {
      if (rows != wanted.end()) throw CacheError(failure.what(), repair_hint(folder));
      plan.remove.push_back(name);  // damaged, and nobody wants what it held
      freed += file_bytes(path);
      continue;
    }
    state.refuse_kind(path, segment->layout().kind);
    const int64_t kept = rows == wanted.end() ? 0 : std::ssize(rows->second);
    if (kept > 0 && *rows->second.rbegin() >= segment->num_samples()) {
      throw CacheError(fmt::format("{}: names sample {} of {} in {}",
                                   show(folder / kIndexName),
                                   *rows->second.rbegin(),
                                   segment->num_samples(),
                                   name),
                       repair_hint(folder));
    }
    report.removed_samples += segment->num_samples() - kept;
    if (kept == 0) {
      plan.remove.push_back(name);
      freed += file_bytes(path);
    } else if (kept < segment->num_samples()) {
      plan.rewrite[name].assign(rows->second.begin(), rows->second.end());
      freed += file_bytes(path) * (segment->num_samples() - kept) / segment->num_samples();
    } else {
      const auto entry = std::ranges::find(manifest.segments, name, &SegmentEntry::name);
      state.register_segment({name, entry->bytes, entry->num_samples, entry->xxh3_128},
                             segment->samples());
    }
  }
  report.removed_segments = std::ssize(plan.remove);
  report.rewritten_segments = std::ssize(plan.rewrite);
  report.removed_others = std::ssize(plan.others);
  report.removed = plan.remove;
  report.removed.insert(report.removed.end(), plan.others.begin(), plan.others.end());
  for (const auto& [name, rows] : plan.rewrite) report.removed.push_back(name);
  std::ranges::sort(report.removed);
  report.bytes_after = report.bytes_before - freed;
  if (dry_run) return report;

  for (const auto& [name, rows] : plan.rewrite) total += file_bytes(folder / name);
  for (const auto& [name, rows] : plan.rewrite) {
    advance(0);
    const Segment segment(folder / name);
    std::vector<Record> records;
    for (const int64_t row : rows) {
      const std::string problem = sample_problem(segment, row);
      if (!problem.empty())
        throw CacheError(fmt::format("{}: {}", show(segment.path()), problem), repair_hint(folder));
      records.push_back(segment.record(row));
    }
    state.publish_segment(segment.header(), records);
    advance(file_bytes(folder / name));
  }
  for (const auto& variant : state.previous_index.variants()) {
    if (variant.segment == kOtherShard || state.places.contains(variant.key)) continue;
    throw CacheError(fmt::format("{}: lacks sample {}, which the index says is in {}",
                                 show(folder),
                                 to_hex(variant.key),
                                 manifest.segments[variant.segment].name),
                     repair_hint(folder));
  }
  state.publish_again();

  // a reader that came meanwhile may have read the old manifest; one that comes later reads the new
  require_no_readers(folder);
  for (const auto& name : report.removed) remove_if_there(folder / name);
  sync_folder(folder);
  report.bytes_after = bytes_of(folder);
  return report;
}

}  // namespace flux::cache
