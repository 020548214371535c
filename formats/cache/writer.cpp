#include "formats/cache/writer.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "formats/cache/folder.h"
#include "formats/cache/header.h"
#include "formats/cache/journal.h"
#include "formats/cache/lock.h"
#include "formats/cache/segment_reader.h"
#include "formats/cache/segment_writer.h"

namespace flux::cache {
namespace fs = std::filesystem;

struct Writer::State : Folder {
  Provenance provenance;
  WriterOptions options;
  Layout layout;
  std::unique_ptr<WriterLock> lock;
  int64_t num_recovered = 0;

  std::unique_ptr<Journal> journal;  // of `pending`
  std::vector<Record> pending;
  std::set<Sha256Digest> pending_keys;
  int64_t pending_bytes = 0;

  SegmentHeader header() const { return {recipe, provenance, utc_now()}; }

  void read_previous() {
    try {
      previous = read_manifest_if_there(folder);
      if (!previous) return;
      refuse_kind(folder / kManifestName, previous->recipe.kind);
      previous_index = read_index_of(folder, *previous);
    } catch (const SchemaError&) {
      throw;
    } catch (const Error& error) {
      if (previous && previous->recipe.kind != recipe.kind) throw;
      // both can be made again from the segments, which is what this run does
      log::warn("{}\n  it is written anew", error.what());
      previous.reset();
    }
  }

  void read_segments(std::span<const std::string> names, std::span<const SegmentEntry> adopted) {
    std::map<std::string, const SegmentEntry*> known;
    for (const auto& entry : adopted) known[entry.name] = &entry;
    if (previous) {
      for (const auto& entry : previous->segments) known[entry.name] = &entry;
    }
    for (const auto& name : names) {
      if (!is_segment_name(name)) continue;
      const auto segment =
          with_repair_hint(folder, [&] { return std::make_unique<const Segment>(folder / name); });
      refuse_kind(segment->path(), segment->layout().kind);
      SegmentFile file{name, bytes_of_file(folder / name), segment->num_samples(), {}};
      const auto entry = known.find(name);
      if (entry != known.end() && entry->second->bytes == file.bytes)
        file.xxh3_128 = entry->second->xxh3_128;
      if (options.verify_segments && entry != known.end()) {
        const auto found = file_xxh3_128(folder / name);
        if (found != entry->second->xxh3_128) {
          throw CacheError(fmt::format("{}: damaged: XXH3-128 {}, the manifest says {}",
                                       show(folder / name),
                                       found,
                                       entry->second->xxh3_128),
                           repair_hint(folder));
        }
      }
      register_segment(std::move(file), segment->samples());
    }
  }

  bool contains(const Sha256Digest& key) const {
    return places.contains(key) || pending_keys.contains(key);
  }

  void add_changes(const SampleInfo& now,
                   std::span<const IndexVariant> before,
                   std::map<std::string, std::optional<Segment>>& open,
                   std::map<std::string, int64_t>& changed_by) const;

  void seal() {
    if (pending.empty()) return;
    journal->check();
    publish_segment({recipe, provenance, utc_now()}, pending);
    pending.clear();
    pending_keys.clear();
    pending_bytes = 0;
    journal->remove();
    journal.reset();
  }
};

// The old sample is the form of the item that is most like the new one: by flags, else the first.
void Writer::State::add_changes(const SampleInfo& now,
                                std::span<const IndexVariant> before,
                                std::map<std::string, std::optional<Segment>>& open,
                                std::map<std::string, int64_t>& changed_by) const {
  const auto alike = std::ranges::find(before, now.flags, &IndexVariant::flags);
  const IndexVariant& old = alike == before.end() ? before.front() : *alike;
  if (old.segment >= previous->segments.size()) return;  // in another shard
  const std::string& name = previous->segments[old.segment].name;
  constexpr size_t kMostOpen = 64;  // 0.6 MB and a descriptor each
  if (open.size() >= kMostOpen && !open.contains(name)) open.clear();
  auto& segment = open[name];
  try {
    if (!segment) segment.emplace(folder / name);
  } catch (const CacheError&) {
    return;  // gone: what changed cannot be told
  }
  if (old.row >= segment->samples().size()) return;
  const SampleInfo& was = segment->samples()[old.row];
  bool any = false;
  const auto differs = [&](const char* field, bool yes) {
    changed_by[field] += yes;
    any = any || yes;
  };
  const Recipe& then = previous->recipe;
  if (recipe.kind == Kind::kText) {
    // with other draws of the same caption the text differs too
    const auto same = [&](const char* field) {
      return recipe.parameters.value(field, nlohmann::json()) ==
             then.parameters.value(field, nlohmann::json());
    };
    differs("caption", was.text != now.text && same("text_variants") && same("seed"));
  } else {
    differs("source_sha256", was.source_sha256 != now.source_sha256);
    differs("bucket", was.height != now.height || was.width != now.width);
    differs("resized", was.resized_hw != now.resized_hw);
    differs("crop_top_left", was.crop_top_left != now.crop_top_left);
    differs("flip_aug", (was.flags ^ now.flags) & kSampleFlipped);
    differs("alpha_mask", (was.flags ^ now.flags) & kSampleMasked);
  }
  for (const auto& [what, a, b] : {std::tuple{"parameters", &recipe.parameters, &then.parameters},
                                   {"weights", &recipe.weights, &then.weights},
                                   {"tokenizers", &recipe.tokenizers, &then.tokenizers}}) {
    for (const auto& [field, value] : a->items()) {
      differs(fmt::format("{}.{}", what, field).c_str(),
              b->value(field, nlohmann::json()) != value);
    }
    for (const auto& [field, value] : b->items())
      differs(fmt::format("{}.{}", what, field).c_str(), !a->contains(field));
  }
  // the tables do not name the picture that a mask is of
  differs("mask", !any && (was.flags & now.flags & kSampleMasked));
  std::erase_if(changed_by, [](const auto& entry) { return entry.second == 0; });
}

Writer::Writer(const fs::path& folder,
               const Recipe& recipe,
               const Provenance& provenance,
               const WriterOptions& options)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.folder = folder;
  s.recipe = recipe;
  s.shard = options.shard;
  s.provenance = provenance;
  s.options = options;
  s.layout = check_recipe(recipe);
  refuse_foreign_files(folder);
  make_folder(folder);
  s.lock = std::make_unique<WriterLock>(folder, WriterLock::Needed::kToWrite);
  if (s.lock->held()) remove_temporary_files(folder);
  s.read_previous();
  const auto names = names_in(folder);
  s.read_segments(names, {});
  if (options.adopt) {
    const auto adopted = options.adopt(s.previous ? &*s.previous : nullptr);
    std::vector<std::string> more;
    for (const auto& entry : adopted) {
      if (!std::ranges::binary_search(names, entry.name)) more.push_back(entry.name);
    }
    s.read_segments(more, adopted);
  }
  if (s.lock->held()) s.num_recovered = s.recover_journals(names);
}

Writer::~Writer() = default;

bool Writer::can_write() const { return state_->lock->held(); }
void Writer::require_writable() const { state_->lock->require_held(); }
int64_t Writer::num_recovered() const { return state_->num_recovered; }
const std::optional<Manifest>& Writer::previous() const { return state_->previous; }
bool Writer::contains(const Sha256Digest& key) const { return state_->contains(key); }

bool Writer::wants(const Sha256Digest& key) const { return state_->wants(key); }

int64_t Writer::num_bytes() const {
  // measured: HDF5's own structures of a segment, and a row of every table
  constexpr int64_t kSegmentBytes = 16 << 10, kRowBytes = 256;
  const State& s = *state_;
  int64_t bytes = s.pending_bytes;
  for (const auto& segment : s.segments) bytes += segment.bytes;
  if (!s.pending.empty())
    bytes += kSegmentBytes + kRowBytes * static_cast<int64_t>(s.pending.size());
  return bytes;
}

Comparison Writer::compare(std::span<const WantedItem> items,
                           const nlohmann::json& plan,
                           const std::function<SampleInfo(const Sha256Digest&)>& expected) const {
  const State& s = *state_;
  enum class Fate { kKept, kNew, kChanged };
  std::unordered_map<Sha256Digest, int64_t, DigestHash>
      before;  // item -> its row in the last index
  for (int64_t i = 0; i < s.previous_index.num_items(); ++i)
    before[s.previous_index.item(i).item] = i;
  std::unordered_map<Sha256Digest, Fate, DigestHash> fates;
  std::map<std::string, std::optional<Segment>> open;
  Comparison out;
  for (const auto& item : items) {
    const auto found = before.find(item.item);
    for (const auto& variant : item.variants) {
      if (!s.wants(variant.key)) continue;
      if (s.contains(variant.key)) {
        fates[variant.key] = Fate::kKept;
        continue;
      }
      bool had_others = found != before.end();
      if (had_others) {
        for (const auto& old : s.previous_index.variants(found->second))
          had_others = had_others && old.key != variant.key;
      }
      Fate& fate = fates.try_emplace(variant.key, Fate::kNew).first->second;
      if (!had_others || fate == Fate::kChanged) continue;
      fate = Fate::kChanged;
      if (expected) {
        s.add_changes(
            expected(variant.key), s.previous_index.variants(found->second), open, out.changed_by);
      }
    }
  }
  for (const auto& [key, fate] : fates) {
    if (fate == Fate::kKept) ++out.kept;
    if (fate == Fate::kNew) ++out.new_samples;
    if (fate == Fate::kChanged) ++out.changed;
  }
  out.unwanted = static_cast<int64_t>(s.places.size() + s.pending_keys.size()) - out.kept;
  if (s.previous) {
    const auto append =
        [&](const char* what, const nlohmann::json& now, const nlohmann::json& was) {
          for (auto& text : differences(what, now, "now", was, "before"))
            out.changed_fields.push_back(std::move(text));
        };
    append("parameters", s.recipe.parameters, s.previous->recipe.parameters);
    append("weights", s.recipe.weights, s.previous->recipe.weights);
    append("tokenizers", s.recipe.tokenizers, s.previous->recipe.tokenizers);
    if (!plan.is_null()) append("plan", plan, s.previous->plan);
  }
  return out;
}

void Writer::add(const SampleInfo& info, std::span<const std::span<const std::byte>> tensors) {
  if (!contains(info.key)) add(prepare(state_->layout, info, tensors));
}

void Writer::add(Record record) {
  State& s = *state_;
  if (s.contains(record.info.key)) return;
  if (record.frames.size() != static_cast<size_t>(num_tensors(s.layout, record.info))) {
    throw std::invalid_argument("cache sample: wrong number of tensors");
  }
  const int64_t bytes = frames_bytes(record);
  if (!s.pending.empty() && s.pending_bytes + bytes > kMaxSegmentBytes) s.seal();
  if (!s.journal) s.journal = std::make_unique<Journal>(s.folder, s.header());
  s.journal->append(record);
  s.pending_keys.insert(record.info.key);
  s.pending_bytes += bytes;
  s.pending.push_back(std::move(record));
  if (s.pending.size() == static_cast<size_t>(kMaxSegmentSamples)) s.seal();
}

void Writer::seal() { state_->seal(); }

bool Writer::publish(const Publication& publication) {
  State& s = *state_;
  s.seal();
  nlohmann::json provenance = {{"tool", printable(s.provenance.tool)},
                               {"tool_version", printable(s.provenance.tool_version)},
                               {"command_line", printable(s.provenance.command_line)},
                               {"device", printable(s.provenance.device)},
                               {"created", utc_now()},
                               {"stage_seconds", publication.stage_seconds}};
  provenance.update(publication.notes);
  return s.publish(publication, provenance);
}

void Writer::withdraw(std::span<const Quarantined> quarantined) {
  state_->seal();
  write_quarantine(state_->folder, quarantined);
  remove_if_there(state_->folder / kManifestName);
  sync_folder(state_->folder);
}

}  // namespace flux::cache
