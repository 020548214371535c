#include "pipelines/cache/contents.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <system_error>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/files.h"
#include "formats/cache/header.h"
#include "formats/cache/journal.h"
#include "formats/cache/segment_reader.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;

constexpr uint32_t kPixelsPerLatent = 8;

struct Names {
  std::vector<std::string> segments, journals;
  std::optional<FileStamp> manifest;  // another one has another stamp
  bool others = false;                // files that are not of the format
  int64_t bytes = 0;                  // of those that are
};

Names names_in_cache(const fs::path& folder) {
  require_folder(folder);
  std::error_code error;
  Names names;
  fs::directory_iterator entry(folder, error), end;
  for (; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().native();
    const bool ours = is_file_of_cache(name);
    if (is_segment_name(name)) names.segments.push_back(name);
    if (is_journal_name(name)) names.journals.push_back(name);
    if (!ours && !name.starts_with(".")) names.others = true;
    std::error_code gone;  // a writer may be at work
    const auto bytes = ours ? fs::file_size(entry->path(), gone) : 0;
    if (!gone) names.bytes += static_cast<int64_t>(bytes);
  }
  if (error)
    throw CacheError(fmt::format("{}: cannot be listed: {}", show(folder), error.message()),
                     "check its permissions");
  try {
    names.manifest = file_stamp(folder / kManifestName);
  } catch (const InputError&) {  // none, or one that will be told about when it is read
  }
  std::sort(names.segments.begin(), names.segments.end());
  std::sort(names.journals.begin(), names.journals.end());
  return names;
}

class Reader {
 public:
  Reader(const fs::path& folder, bool recover) : recover_(recover) { out_.folder = folder; }

  Contents read(const Names& names) {
    out_.num_bytes = names.bytes;
    read_manifest_and_index();
    for (const auto& name : names.segments) read_segment(name);
    for (const auto& name : names.journals) read_journal(name);
    if (names.others && !out_.manifest && out_.segments.empty() && out_.journals.empty() &&
        out_.problems.empty()) {
      throw CacheError(
          show(out_.folder) + ": is no cache: it has no manifest, no segment and no journal",
          "give the folder that --out of a cache tool named");
    }
    out_.complete = out_.manifest && out_.index && segments_agree();
    choose_samples();
    if (out_.manifest) {
      const auto& p = out_.manifest->provenance;
      const auto text = [&](const char* name) { return value_of(p, name, std::string()); };
      out_.header = {out_.manifest->recipe,
                     {text("tool"), text("tool_version"), text("command_line"), text("device")},
                     text("created")};
    }
    return std::move(out_);
  }

 private:
  void take_kind(Kind kind, const std::string& file) {
    if (out_.kind && *out_.kind != kind) {
      throw CacheError(fmt::format("{}: {} is of kind {}, others are of kind {}",
                                   show(out_.folder),
                                   file,
                                   kind_name(kind),
                                   kind_name(*out_.kind)),
                       "one folder holds one cache: move the files of the other kind away");
    }
    out_.kind = kind;
  }

  void add_problem(std::string text, std::string hint) {
    if (out_.problems.empty()) out_.hint = std::move(hint);
    out_.problems.push_back(std::move(text));
  }

  // What is wrong with a file is told, and the rest is read; a newer schema ends it.
  template <class Work>
  bool attempt(const Work& work) {
    try {
      work();
      return true;
    } catch (const SchemaError&) {
      throw;
    } catch (const Error& error) {
      const std::string text = error.what();
      const std::string_view mark = "\n  hint: ";
      const bool unreadable = dynamic_cast<const UnreadableError*>(&error) != nullptr;
      add_problem(
          text.substr(0, text.find('\n')),
          unreadable ? text.substr(text.find(mark) + mark.size()) : repair_hint(out_.folder));
      return false;
    }
  }

  void read_manifest_and_index() {
    attempt([&] { out_.manifest = read_manifest_if_there(out_.folder); });
    if (!out_.manifest) return;
    take_kind(out_.manifest->recipe.kind, kManifestName);
    attempt([&] { out_.index = read_index_of(out_.folder, *out_.manifest); });
  }

  void read_segment(const std::string& name) {
    cancel::check();
    attempt([&] {
      const Segment segment(out_.folder / name);
      take_kind(segment.layout().kind, name);
      const int64_t bytes = bytes_of_file(out_.folder / name);
      out_.segments.push_back({name, bytes, segment.num_samples(), segment.header()});
      out_.segment_bytes += bytes;
      if (segment.header().created >= out_.header.created) out_.header = segment.header();
      for (const SampleInfo& info : segment.samples()) {
        for (int which = 0; which < num_tensors(segment.layout(), info); ++which)
          out_.decoded_bytes += tensor_bytes(segment.layout(), info, which);
        // of two samples with one key the one whose segment comes first counts
        if (found_.try_emplace(to_hex(info.key), found_in_segments_.size()).second)
          found_in_segments_.push_back({info, name, &info - segment.samples().data()});
      }
    });
  }

  void read_journal(const std::string& name) {
    cancel::check();
    attempt([&] {
      const fs::path path = out_.folder / name;
      const MappedFile file(path);
      const JournalContent content = parse_journal(file.bytes(), path);
      const auto bytes = static_cast<int64_t>(file.bytes().size());
      out_.journals.push_back({name,
                               bytes,
                               static_cast<int64_t>(content.records.size()),
                               bytes - static_cast<int64_t>(content.valid_bytes)});
      if (content.valid_bytes == 0) return;
      take_kind(content.header.recipe.kind, name);
      if (content.header.created > out_.header.created) out_.header = content.header;
      for (const Record& record : content.records) {
        if (!found_.try_emplace(to_hex(record.info.key), SIZE_MAX).second) continue;
        found_in_journals_.push_back({record.info, name});
      }
    });
    out_.num_in_journals = static_cast<int64_t>(found_in_journals_.size());
  }

  bool segments_agree() {
    bool agree = true;
    for (const auto& entry : out_.manifest->segments) {
      const auto found = std::find_if(out_.segments.begin(),
                                      out_.segments.end(),
                                      [&](const auto& s) { return s.name == entry.name; });
      if (found != out_.segments.end() && found->bytes == entry.bytes &&
          found->num_samples == entry.num_samples) {
        continue;
      }
      agree = false;
      if (found == out_.segments.end()) {
        add_problem(
            fmt::format("{}: is not there, or cannot be read", show(out_.folder / entry.name)),
            repair_hint(out_.folder));
      } else {
        add_problem(fmt::format("{}: has {} bytes and {} samples, the manifest says {} and {}",
                                show(out_.folder / entry.name),
                                found->bytes,
                                found->num_samples,
                                entry.bytes,
                                entry.num_samples),
                    repair_hint(out_.folder));
      }
    }
    return agree;
  }

  // Segments that a run which did not end has sealed since the manifest was written.
  std::set<std::string> newer_segments() const {
    std::set<std::string> names;
    std::error_code error;  // a file that goes meanwhile has no time, and is looked for again
    const auto since = fs::last_write_time(out_.folder / kManifestName, error);
    for (const auto& segment : out_.segments) {
      const auto written = fs::last_write_time(out_.folder / segment.name, error);
      if (!error && written > since) names.insert(segment.name);
    }
    for (const auto& entry : out_.manifest->segments) names.erase(entry.name);
    return names;
  }

  void choose_samples() {
    if (out_.manifest && out_.index) {
      std::vector<bool> taken(found_in_segments_.size(), false);
      for (int64_t i = 0; i < out_.index->num_items(); ++i) {
        for (const IndexVariant& variant : out_.index->variants(i)) {
          if (variant.segment == kOtherShard) continue;
          const auto found = found_.find(to_hex(variant.key));
          if (found == found_.end() || found->second == SIZE_MAX || taken[found->second]) continue;
          taken[found->second] = true;
          auto& sample = found_in_segments_[found->second];
          if (!(out_.index->item(i).flags & kItemEmptyCaption))
            sample.path = std::string(out_.index->path(i));
          out_.samples.push_back(sample);
        }
      }
      for (const auto& segment : out_.segments) out_.num_unwanted += segment.num_samples;
      out_.num_unwanted -= static_cast<int64_t>(out_.samples.size());
      if (recover_) {
        const auto newer = newer_segments();
        for (size_t i = 0; i < found_in_segments_.size(); ++i) {
          auto& sample = found_in_segments_[i];
          if (taken[i] || !newer.contains(sample.file)) continue;
          if (*out_.kind == Kind::kLatents) sample.path = sample.info.text;
          out_.samples.push_back(sample);
        }
      }
    } else {
      for (auto& sample : found_in_segments_) {
        if (*out_.kind == Kind::kLatents) sample.path = sample.info.text;
        out_.samples.push_back(std::move(sample));
      }
    }
    if (!recover_) return;
    for (auto& sample : found_in_journals_) {
      if (*out_.kind == Kind::kLatents) sample.path = sample.info.text;
      out_.samples.push_back(std::move(sample));
    }
  }

  bool recover_;
  Contents out_;
  std::unordered_map<std::string, size_t> found_;  // key -> position in found_in_segments_
  std::vector<ListedSample> found_in_segments_, found_in_journals_;
};

}  // namespace

Contents look_into(const fs::path& folder, bool recover) {
  // A writer at work seals its journal into a segment now and then, and puts a new manifest in
  // place: look again if that was now.
  constexpr int kTries = 20;
  for (int attempt = 1;; ++attempt) {
    const Names before = names_in_cache(folder);
    Contents out = Reader(folder, recover).read(before);
    const Names after = names_in_cache(folder);
    const bool same = before.segments == after.segments && before.journals == after.journals &&
                      before.manifest == after.manifest;
    if (same || attempt == kTries) return out;
  }
}

void require_one_folder(const std::vector<std::string>& folders, const char* example) {
  if (folders.size() != 1)
    throw UsageError(
        fmt::format("one folder is needed, {} given",
                    folders.empty() ? "none is" : fmt::format("{} are", folders.size())),
        example);
}

std::string bucket_text(uint32_t height, uint32_t width) {
  return fmt::format("{}x{}", width * kPixelsPerLatent, height * kPixelsPerLatent);
}

}  // namespace flux::cache
