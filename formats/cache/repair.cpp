#include "formats/cache/repair.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <system_error>
#include <unordered_map>
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

// A segment with something wrong in it, and what can be kept of it.
struct Damaged {
  std::string name;
  std::string reason;           // of the file as a whole; empty: samples alone
  std::vector<int64_t> good;    // rows
  std::vector<LostSample> bad;  // the other rows
};

class Repair {
 public:
  Repair(const fs::path& folder, const std::function<void(int64_t, int64_t)>& progress)
      : progress_(progress) {
    state_.folder = folder;
  }

  RepairReport run() {
    const fs::path& folder = state_.folder;
    require_cache();
    refuse_foreign_files(folder);
    const WriterLock lock(folder);
    finish_publication(folder);
    remove_temporary_files(folder);
    read_manifest_and_index();
    check_segments();
    find_lost();
    const bool loses_wanted = std::ranges::any_of(report_.lost, &LostSample::wanted);
    const bool withdraws = has_manifest_ && (loses_wanted || !state_.previous);
    if (!damaged_.empty()) require_no_readers(folder);
    if (withdraws) {
      remove_if_there(folder / kManifestName);
      sync_folder(folder);
      state_.previous.reset();
      // nothing vouches for these any more
      if (!index_reads_) remove_if_there(folder / kIndexName);
      if (manifest_reads_) write_quarantine(folder, manifest_.quarantined);
    }
    for (const Damaged& file : damaged_) {
      advance(0);
      salvage(file);
    }
    take_kind_of_journals();
    report_.recovered = state_.recover_journals(names_);
    bool published = false;
    if (state_.previous) {
      published = state_.publish_again() || state_.wrote_quarantine;
    }
    if (!damaged_.empty()) require_no_readers(folder);
    for (const Damaged& file : damaged_) {
      remove_if_there(folder / file.name);
      ++report_.removed_segments;
    }
    sync_folder(folder);
    report_.num_samples = std::ssize(state_.places);
    report_.complete = state_.previous.has_value();
    report_.changed = withdraws || published || !damaged_.empty() || report_.recovered > 0;
    return std::move(report_);
  }

 private:
  // Before anything is made in a folder that is no cache.
  void require_cache() const {
    const fs::path& folder = state_.folder;
    require_folder(folder);
    const auto is_ours = [](const std::string& name) {
      return is_segment_name(name) || is_journal_name(name) || name == kManifestName;
    };
    if (std::ranges::any_of(names_in(folder), is_ours)) return;
    throw CacheError(fmt::format("{}: no cache there: it has neither {}, segments nor journals",
                                 show(folder),
                                 kManifestName),
                     "check the path");
  }

  void read_manifest_and_index() {
    const fs::path& folder = state_.folder;
    names_ = names_in(folder);
    has_manifest_ = is_there(folder / kManifestName);
    try {
      state_.previous = read_manifest_if_there(folder);
    } catch (const SchemaError&) {
      throw;
    } catch (const CacheError& error) {
      withdraw_for(kManifestName, error);
    }
    if (state_.previous) {
      manifest_ = *state_.previous;
      manifest_reads_ = true;
      state_.recipe = state_.previous->recipe;
      state_.shard = state_.previous->shard;
      has_kind_ = true;
    }
    // without its manifest the index still tells the paths
    for (const Kind kind : {Kind::kLatents, Kind::kText}) {
      if (has_kind_ && kind != state_.recipe.kind) continue;
      try {
        if (state_.previous) read_index_of(folder, manifest_);
      } catch (const SchemaError&) {
        throw;
      } catch (const CacheError& error) {
        withdraw_for(kIndexName, error);
      }
      try {
        state_.previous_index = read_index(folder / kIndexName, kind);
        index_reads_ = true;
        break;
      } catch (const SchemaError&) {
        throw;
      } catch (const CacheError&) {
        // nothing tells the paths
      }
    }
    const Index& index = state_.previous_index;
    for (int64_t i = 0; i < index.num_items(); ++i) {
      for (const auto& variant : index.variants(i)) {
        if (variant.segment == kOtherShard) continue;
        paths_.try_emplace(variant.key, index.path(i));
        if (state_.previous) keys_of_[manifest_.segments[variant.segment].name].insert(variant.key);
      }
    }
  }

  // Without the index, or without itself, the manifest cannot stay: only the data set tells which
  // items there are.
  void withdraw_for(const char* name, const CacheError& error) {
    state_.previous.reset();
    report_.unreadable = fmt::format("{}: {}", name, plain_message(error, state_.folder / name));
  }

  void advance(int64_t bytes) {
    done_ += bytes;
    if (progress_) progress_(done_, total_);
  }

  LostSample lost(const SampleInfo& sample, const std::string& file, std::string reason) const {
    const auto path = paths_.find(sample.key);
    return {sample.key,
            file,
            path == paths_.end() || path->second.empty() ? sample.text : path->second,
            std::move(reason),
            path != paths_.end()};
  }

  // of a first run that was killed before it sealed anything
  void take_kind_of_journals() {
    for (const auto& name : names_) {
      if (has_kind_ || !is_journal_name(name)) continue;
      const fs::path path = state_.folder / name;
      const JournalContent content = parse_journal(MappedFile(path).bytes(), path);
      if (content.valid_bytes == 0) continue;
      state_.recipe = content.header.recipe;
      has_kind_ = true;
    }
  }

  void check_segments() {
    const fs::path& folder = state_.folder;
    std::map<std::string, int64_t> files;
    for (const auto& name : names_) {
      if (!is_segment_name(name)) continue;
      std::error_code error;
      const auto bytes = fs::file_size(folder / name, error);
      total_ += files[name] = error ? 0 : static_cast<int64_t>(bytes);
    }
    for (const auto& [name, bytes] : files) {
      check_segment(name, bytes);
      advance(bytes);
    }
  }

  void check_segment(const std::string& name, int64_t bytes) {
    const fs::path path = state_.folder / name;
    Damaged damaged{name, {}, {}, {}};
    const std::string hash = file_xxh3_128(path);  // what cannot be read at all is not damaged
    const auto entry = std::ranges::find(manifest_.segments, name, &SegmentEntry::name);
    try {
      if (entry != manifest_.segments.end() && hash != entry->xxh3_128)
        damaged.reason = fmt::format("XXH3-128 {}, the manifest says {}", hash, entry->xxh3_128);
      const Segment segment(path);
      if (!has_kind_) {
        state_.recipe = segment.header().recipe;
        has_kind_ = true;
      }
      state_.refuse_kind(path, segment.layout().kind);
      for (int64_t row = 0; row < segment.num_samples(); ++row) {
        const SampleInfo& sample = segment.samples()[static_cast<size_t>(row)];
        std::string problem = sample_problem(segment, row);
        if (problem.empty())
          damaged.good.push_back(row);
        else
          damaged.bad.push_back(lost(sample, name, std::move(problem)));
      }
      if (damaged.reason.empty() && damaged.bad.empty()) {
        state_.register_segment({name, bytes, segment.num_samples(), hash}, segment.samples());
        return;
      }
      for (const int64_t row : damaged.good)
        salvageable_.insert(segment.samples()[static_cast<size_t>(row)].key);
    } catch (const SchemaError&) {
      throw;
    } catch (const CacheError& error) {
      if (is_other_kind(path)) throw;
      damaged.reason = plain_message(error, path);
      damaged.good.clear(), damaged.bad.clear();
    }
    damaged_.push_back(std::move(damaged));
  }

  bool is_other_kind(const fs::path& path) const {
    try {
      return has_kind_ && Segment(path).layout().kind != state_.recipe.kind;
    } catch (const CacheError&) {
      return false;
    }
  }

  bool survives(const Sha256Digest& key) const {
    return state_.places.contains(key) || salvageable_.contains(key);
  }

  void find_lost() {
    std::set<Sha256Digest> listed;
    const auto add = [&](LostSample sample) {
      if (sample.key && (survives(*sample.key) || !listed.insert(*sample.key).second)) return;
      report_.lost.push_back(std::move(sample));
    };
    for (Damaged& file : damaged_) {
      const bool opened = !file.good.empty() || !file.bad.empty();
      for (LostSample& sample : file.bad) add(sample);
      if (opened) continue;
      const auto keys = keys_of_.find(file.name);
      if (keys == keys_of_.end()) {  // nobody knows what it held
        add({std::nullopt, file.name, {}, file.reason, false});
        continue;
      }
      for (const auto& key : keys->second) add({key, file.name, paths_.at(key), file.reason, true});
    }
    for (const auto& [name, keys] : keys_of_) {
      const bool there = std::ranges::binary_search(names_, name);
      for (const auto& key : keys) {
        add({key,
             name,
             paths_.at(key),
             there ? "the segment does not hold it" : "the segment is absent",
             true});
      }
    }
    std::ranges::stable_sort(report_.lost, {}, &LostSample::file);
  }

  // The good samples that no other segment has, in a segment of their own.
  void salvage(const Damaged& file) {
    if (file.good.empty()) return;
    const Segment segment(state_.folder / file.name);
    std::vector<Record> records;
    for (const int64_t row : file.good) {
      if (!state_.places.contains(segment.samples()[static_cast<size_t>(row)].key))
        records.push_back(segment.record(row));
    }
    if (!records.empty()) state_.publish_records(segment.header(), records);
    report_.salvaged += std::ssize(records);
  }

  Folder state_;
  std::function<void(int64_t, int64_t)> progress_;
  int64_t done_ = 0, total_ = 0;  // bytes
  RepairReport report_;
  Manifest manifest_;  // what it said, even where it goes
  bool has_manifest_ = false, has_kind_ = false, manifest_reads_ = false, index_reads_ = false;
  std::vector<std::string> names_;
  std::vector<Damaged> damaged_;
  std::unordered_map<Sha256Digest, std::string, DigestHash> paths_;  // of the index's samples
  std::map<std::string, std::set<Sha256Digest>> keys_of_;  // segment -> samples the index has there
  std::set<Sha256Digest> salvageable_;                     // good samples of damaged segments
};

}  // namespace

RepairReport repair_cache(const fs::path& folder,
                          const std::function<void(int64_t, int64_t)>& progress) {
  return Repair(folder, progress).run();
}

}  // namespace flux::cache
