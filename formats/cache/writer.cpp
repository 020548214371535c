#include "formats/cache/writer.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <map>
#include <set>
#include <stdexcept>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "formats/cache/header.h"
#include "formats/cache/journal.h"
#include "formats/cache/lock.h"
#include "formats/cache/segment_reader.h"
#include "formats/cache/segment_writer.h"

namespace flux::cache {
namespace fs = std::filesystem;
namespace {

constexpr char kQuarantineName[] = "quarantine.jsonl";

struct DigestHash {
  size_t operator()(const Sha256Digest& digest) const {
    size_t value;  // a digest is as good as its first bytes
    std::memcpy(&value, digest.data(), sizeof value);
    return value;
  }
};

std::string utc_now() {
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
}

int64_t frames_bytes(const Record& record) {
  size_t bytes = 0;
  for (const auto& frame : record.frames) bytes += frame.size();
  return static_cast<int64_t>(bytes);
}

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    names.push_back(entry->path().filename().native());
  }
  if (error)
    throw ResourceError(fmt::format("{}: cannot be listed: {}", show(folder), error.message()),
                        write_failure_hint(error.value()));
  std::sort(names.begin(), names.end());
  return names;
}

// What an interrupted AtomicFile or WriterLock leaves behind.
bool is_temporary_name(std::string_view name) {
  return name.find(".tmp-") != std::string_view::npos &&
         (name.starts_with(".seg-") || name.starts_with(".manifest.json") ||
          name.starts_with(".index.h5") || name.starts_with(".quarantine.jsonl") ||
          name.starts_with(".writer.lock"));
}

std::string repair_hint(const fs::path& folder) {
  return fmt::format("flux-cache repair {}, then run the caching tool again", show(folder));
}

void remove_if_there(const fs::path& path) {
  if (unlink(path.c_str()) != 0 && errno != ENOENT) {
    const int number = errno;
    throw ResourceError(
        fmt::format(
            "{}: cannot be removed: {}", show(path), std::generic_category().message(number)),
        write_failure_hint(number));
  }
}

}  // namespace

struct Writer::State {
  struct SegmentFile {
    std::string name;
    int64_t bytes = 0, num_samples = 0;
    std::string xxh3_128;  // empty: not known yet
  };
  struct Place {
    uint32_t segment = 0, row = 0, height = 0, width = 0;  // segment: position in `segments`
  };

  fs::path folder;
  Recipe recipe;
  Provenance provenance;
  WriterOptions options;
  Layout layout;
  std::unique_ptr<WriterLock> lock;
  std::optional<Manifest> previous;
  Index previous_index;
  std::vector<SegmentFile> segments;
  std::unordered_map<Sha256Digest, Place, DigestHash> places;  // of published samples
  int64_t num_recovered = 0;

  std::unique_ptr<Journal> journal;  // of `pending`
  std::vector<Record> pending;
  std::set<Sha256Digest> pending_keys;
  int64_t pending_bytes = 0;

  SegmentHeader header() const { return {recipe, provenance, utc_now()}; }

  void refuse_kind(const fs::path& path, Kind kind) const {
    if (kind == recipe.kind) return;
    throw CacheError(fmt::format("{}: belongs to a {} cache, this run writes {}",
                                 show(path),
                                 kind_name(kind),
                                 kind_name(recipe.kind)),
                     "give each cache a folder of its own");
  }

  void read_previous() {
    try {
      previous = read_manifest_if_there(folder);
      if (!previous) return;
      refuse_kind(folder / kManifestName, previous->recipe.kind);
      const auto path = folder / kIndexName;
      if (xxh3_128_hex(MappedFile(path).bytes()) != previous->index_xxh3_128)
        throw CacheError(show(path) + ": is not the manifest's");
      previous_index = read_index(path, recipe.kind);
    } catch (const SchemaError&) {
      throw;
    } catch (const Error& error) {
      if (previous && previous->recipe.kind != recipe.kind) throw;
      // both can be made again from the segments, which is what this run does
      log::warn("{}\n  it is written anew", error.what());
      previous.reset();
    }
  }

  void register_segment(SegmentFile file, std::span<const SampleInfo> samples) {
    const auto position = static_cast<uint32_t>(segments.size());
    for (size_t i = 0; i < samples.size(); ++i) {
      // of two samples with one key the one in the segment that comes first by name counts
      places.try_emplace(
          samples[i].key,
          Place{position, static_cast<uint32_t>(i), samples[i].height, samples[i].width});
    }
    segments.push_back(std::move(file));
  }

  void read_segments(const std::vector<std::string>& names) {
    std::map<std::string, const SegmentEntry*> known;
    if (previous) {
      for (const auto& entry : previous->segments) known[entry.name] = &entry;
    }
    for (const auto& name : names) {
      if (!is_segment_name(name)) continue;
      std::optional<Segment> segment;
      try {
        segment.emplace(folder / name);
      } catch (const SchemaError&) {
        throw;
      } catch (const CacheError& error) {
        throw CacheError(error.what(), repair_hint(folder));
      }
      refuse_kind(segment->path(), segment->layout().kind);
      SegmentFile file{
          name, static_cast<int64_t>(fs::file_size(folder / name)), segment->num_samples(), {}};
      const auto entry = known.find(name);
      if (entry != known.end() && entry->second->bytes == file.bytes)
        file.xxh3_128 = entry->second->xxh3_128;
      if (options.verify_segments && entry != known.end()) {
        const auto found = xxh3_128_hex(MappedFile(folder / name).bytes());
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

  void publish_segment(const SegmentHeader& segment_header, std::span<const Record> records) {
    const auto bytes = encode_segment(segment_header, records);
    const std::string name = new_segment_name();
    AtomicFile file(folder / name);
    file.write(bytes);
    file.commit_new();
    std::vector<SampleInfo> samples;
    for (const Record& record : records) samples.push_back(record.info);
    register_segment({name,
                      static_cast<int64_t>(bytes.size()),
                      static_cast<int64_t>(records.size()),
                      xxh3_128_hex(bytes)},
                     samples);
  }

  void recover(const std::vector<std::string>& names) {
    for (const auto& name : names) {
      if (!is_journal_name(name)) continue;
      const fs::path path = folder / name;
      {
        const MappedFile file(path);
        JournalContent content = parse_journal(file.bytes(), path);
        if (content.valid_bytes > 0) refuse_kind(path, content.header.recipe.kind);
        // a writer killed between publishing and removing its journal leaves samples that are there
        // already
        std::erase_if(content.records,
                      [&](const Record& record) { return places.contains(record.info.key); });
        for (size_t begin = 0; begin < content.records.size();) {
          size_t end = begin;
          int64_t bytes = 0;
          while (end < content.records.size() &&
                 end - begin < static_cast<size_t>(kMaxSegmentSamples) &&
                 (end == begin || bytes + frames_bytes(content.records[end]) <= kMaxSegmentBytes)) {
            bytes += frames_bytes(content.records[end++]);
          }
          publish_segment(content.header, std::span(content.records).subspan(begin, end - begin));
          begin = end;
        }
        num_recovered += static_cast<int64_t>(content.records.size());
      }
      remove_if_there(path);
    }
  }

  bool contains(const Sha256Digest& key) const {
    return places.contains(key) || pending_keys.contains(key);
  }

  bool wants(const Sha256Digest& key) const {
    return shard_of(key, options.shard.count) == options.shard.index;
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

  void write_quarantine(std::span<const Quarantined> quarantined) const {
    const fs::path path = folder / kQuarantineName;
    if (quarantined.empty()) return remove_if_there(path);
    std::string text;
    for (const auto& item : quarantined) {
      text += canonical_json({{"item", to_hex(item.item)},
                              {"subset", item.subset},
                              {"path", printable(item.path)},
                              {"reason", printable(item.reason)}}) +
              "\n";
    }
    write_file_if_changed(path, text);
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
  auto& segment = open[name];
  try {
    if (!segment) segment.emplace(folder / name);
  } catch (const CacheError&) {
    return;  // gone: what changed cannot be told
  }
  if (old.row >= segment->samples().size()) return;
  const SampleInfo& was = segment->samples()[old.row];
  const auto differs = [&](const char* field, bool yes) { changed_by[field] += yes; };
  if (recipe.kind == Kind::kText) {
    differs("caption", was.text != now.text);
  } else {
    differs("source_sha256", was.source_sha256 != now.source_sha256);
    differs("bucket", was.height != now.height || was.width != now.width);
    differs("resized", was.resized_hw != now.resized_hw);
    differs("crop_top_left", was.crop_top_left != now.crop_top_left);
    differs("flags", was.flags != now.flags);
  }
  const Recipe& then = segment->header().recipe;
  for (const auto& [what, a, b] : {std::tuple{"parameters", &recipe.parameters, &then.parameters},
                                   {"weights", &recipe.weights, &then.weights},
                                   {"tokenizers", &recipe.tokenizers, &then.tokenizers}}) {
    for (const auto& [field, value] : a->items()) {
      differs(fmt::format("{}.{}", what, field).c_str(),
              b->value(field, nlohmann::json()) != value);
    }
  }
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
  s.provenance = provenance;
  s.options = options;
  s.layout = check_recipe(recipe);
  make_folder(folder);
  s.lock = std::make_unique<WriterLock>(folder);
  const auto names = names_in(folder);
  for (const auto& name : names) {
    if (is_temporary_name(name)) remove_if_there(folder / name);
  }
  s.read_previous();
  s.read_segments(names);
  s.recover(names);
}

Writer::~Writer() = default;

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
  if (record.frames.size() != static_cast<size_t>(num_tensors(s.layout.kind))) {
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

  std::set<uint32_t> used;  // positions in s.segments
  std::set<Sha256Digest> keys;
  for (const auto& item : publication.items) {
    for (const auto& variant : item.variants) {
      if (!s.wants(variant.key)) continue;
      const auto place = s.places.find(variant.key);
      if (place == s.places.end()) {
        throw std::invalid_argument(fmt::format(
            "sample {} of {} is not in the cache", to_hex(variant.key), printable(item.path)));
      }
      used.insert(place->second.segment);
      keys.insert(variant.key);
    }
  }
  std::vector<uint32_t> by_name(used.begin(), used.end());
  std::sort(by_name.begin(), by_name.end(), [&](uint32_t a, uint32_t b) {
    return s.segments[a].name < s.segments[b].name;
  });
  std::map<uint32_t, uint32_t> number;  // position in s.segments -> in the manifest

  Manifest manifest;
  for (const uint32_t position : by_name) {
    auto& file = s.segments[position];
    if (file.xxh3_128.empty())
      file.xxh3_128 = xxh3_128_hex(MappedFile(s.folder / file.name).bytes());
    number[position] = static_cast<uint32_t>(manifest.segments.size());
    manifest.segments.push_back({file.name, file.bytes, file.xxh3_128, file.num_samples});
  }
  Index index;
  for (const auto& item : publication.items) {
    std::vector<IndexVariant> variants;
    for (const auto& variant : item.variants) {
      if (!s.wants(variant.key)) {
        variants.push_back({variant.key,
                            kOtherShard,
                            0,
                            variant.height,
                            variant.width,
                            variant.flags,
                            variant.weight});
        continue;
      }
      const auto& place = s.places.at(variant.key);
      variants.push_back({variant.key,
                          number.at(place.segment),
                          place.row,
                          place.height,
                          place.width,
                          variant.flags,
                          variant.weight});
    }
    index.add({item.item, item.subset, item.repeats, item.flags, 0, 0}, item.path, variants);
    if ((item.flags & kItemEmptyCaption) == 0) ++manifest.num_items;
  }
  manifest.recipe = s.recipe;
  manifest.plan = publication.plan;
  manifest.plan_digest = publication.plan_digest;
  manifest.num_samples = static_cast<int64_t>(keys.size());
  manifest.quarantined = publication.quarantined;
  for (auto& item : manifest.quarantined) {  // as it will be read
    item.path = printable(item.path);
    item.reason = printable(item.reason);
  }
  manifest.shard = s.options.shard;
  manifest.provenance = {{"tool", printable(s.provenance.tool)},
                         {"tool_version", printable(s.provenance.tool_version)},
                         {"command_line", printable(s.provenance.command_line)},
                         {"device", printable(s.provenance.device)},
                         {"created", utc_now()},
                         {"stage_seconds", publication.stage_seconds}};
  manifest.provenance.update(publication.notes);

  // An equal index keeps its file, whatever bytes this HDF5 library would write, so that the
  // manifest stays equal too.
  std::vector<std::byte> index_bytes;
  if (s.previous && s.previous_index == index) {
    manifest.index_bytes = s.previous->index_bytes;
    manifest.index_xxh3_128 = s.previous->index_xxh3_128;
  } else {
    index_bytes = encode_index(index, s.recipe.kind);
    manifest.index_bytes = static_cast<int64_t>(index_bytes.size());
    manifest.index_xxh3_128 = xxh3_128_hex(index_bytes);
  }
  s.write_quarantine(manifest.quarantined);
  if (s.previous && same_content(manifest, *s.previous)) return false;

  // Both files are on the disk under temporary names before the old manifest goes: a kill in
  // between leaves a cache that says it is incomplete, never a manifest with another index.
  const fs::path manifest_path = s.folder / kManifestName;
  AtomicFile manifest_file(manifest_path);
  manifest_file.write(manifest_text(manifest));
  if (!index_bytes.empty()) {
    AtomicFile index_file(s.folder / kIndexName);
    index_file.write(index_bytes);
    remove_if_there(manifest_path);
    sync_folder(s.folder);  // else a power cut may leave the new index and the old manifest
    index_file.commit();
  }
  manifest_file.commit();
  s.previous = std::move(manifest);
  s.previous_index = std::move(index);
  return true;
}

void Writer::withdraw(std::span<const Quarantined> quarantined) {
  state_->seal();
  state_->write_quarantine(quarantined);
  remove_if_there(state_->folder / kManifestName);
  sync_folder(state_->folder);
}

}  // namespace flux::cache
