#include "formats/cache/folder.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>
#include <map>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/journal.h"

namespace flux::cache {
namespace fs = std::filesystem;

std::string utc_now() {
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
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

void remove_if_there(const fs::path& path) {
  if (unlink(path.c_str()) != 0 && errno != ENOENT) {
    const int number = errno;
    if (!is_there(path)) return;  // a read-only disk says so first
    throw ResourceError(
        fmt::format(
            "{}: cannot be removed: {}", show(path), std::generic_category().message(number)),
        write_failure_hint(number));
  }
}

void remove_temporary_files(const fs::path& folder) {
  for (const auto& name : names_in(folder)) {
    if (is_temporary_name(name)) remove_if_there(folder / name);
  }
}

int64_t frames_bytes(const Record& record) {
  size_t bytes = 0;
  for (const auto& frame : record.frames) bytes += frame.size();
  return static_cast<int64_t>(bytes);
}

std::string quarantine_text(std::span<const Quarantined> quarantined) {
  std::string text;
  for (const auto& item : quarantined) {
    text += canonical_json({{"item", to_hex(item.item)},
                            {"subset", item.subset},
                            {"path", printable(item.path)},
                            {"reason", printable(item.reason)}}) +
            "\n";
  }
  return text;
}

bool write_quarantine(const fs::path& folder, std::span<const Quarantined> quarantined) {
  const fs::path path = folder / kQuarantineName;
  if (!quarantined.empty()) return write_file_if_changed(path, quarantine_text(quarantined));
  const bool was_there = is_there(path);
  remove_if_there(path);
  return was_there;
}

std::string plain_message(const std::exception& error, const fs::path& path) {
  std::string text = error.what();
  const std::string start = show(path) + ": ";
  if (text.starts_with(start)) text.erase(0, start.size());
  if (const size_t hint = text.find("\n  hint: "); hint != std::string::npos) text.erase(hint);
  for (size_t at; (at = text.find("\n  ")) != std::string::npos;) text.replace(at, 3, "; ");
  return text;
}

std::string sample_name(const Sha256Digest& key, std::string_view path) {
  std::string name = to_hex(key);
  if (!path.empty()) name += " " + printable(path);
  return name;
}

std::string file_xxh3_128(const fs::path& path) {
  try {
    return xxh3_128_hex(MappedFile(path).bytes());
  } catch (const InputError& error) {
    refuse_unreadable(path);
    throw CacheError(message_of(error), "check the file and its disk");
  }
}

namespace {

// Elements whose exponent has all bits set.
int64_t count_not_finite(std::span<const std::byte> bytes, DType dtype) {
  const auto count = [&]<class Word>(Word exponent) {
    int64_t found = 0;
    for (size_t at = 0; at + sizeof(Word) <= bytes.size(); at += sizeof(Word)) {
      Word word;
      std::memcpy(&word, bytes.data() + at, sizeof word);
      found += (word & exponent) == exponent;
    }
    return found;
  };
  if (dtype == DType::kF32) return count(uint32_t{0x7F800000});
  return count(dtype == DType::kBF16 ? uint16_t{0x7F80} : uint16_t{0x7C00});
}

}  // namespace

std::string sample_problem(const Segment& segment, int64_t row) {
  try {
    const auto tensors = segment.read(row);
    for (size_t i = 0; i < tensors.size(); ++i) {
      const int64_t count =
          count_not_finite(tensors[i], tensor_dtype(segment.layout(), static_cast<int>(i)));
      if (count > 0) return fmt::format("tensor {} has {} values that are not finite", i, count);
    }
  } catch (const CacheError& error) {
    return plain_message(error, segment.path());
  }
  return {};
}

std::vector<WantedItem> items_of(const Index& index) {
  std::vector<WantedItem> items;
  items.reserve(static_cast<size_t>(index.num_items()));
  for (int64_t i = 0; i < index.num_items(); ++i) {
    const IndexItem& from = index.item(i);
    WantedItem& item = items.emplace_back();
    item.item = from.item;
    item.subset = from.subset, item.repeats = from.repeats, item.flags = from.flags;
    item.path = index.path(i);
    for (const auto& v : index.variants(i))
      item.variants.push_back({v.key, v.weight, v.flags, v.height, v.width});
  }
  return items;
}

// Both files are on the disk under temporary names before the old manifest goes, and stay there
// whatever fails afterwards: a kill in between leaves a cache that says it is incomplete and that
// finish_publication() mends, never a manifest with another index.
void publish_files(const fs::path& folder,
                   std::string_view text,
                   std::span<const std::byte> index_bytes,
                   const std::function<void()>& before_manifest) {
  const fs::path path = folder / kManifestName;
  AtomicFile manifest_file(path);
  manifest_file.write(text);
  if (!index_bytes.empty()) {
    AtomicFile index_file(folder / kIndexName);
    index_file.write(index_bytes);
    manifest_file.flush();
    index_file.flush();
    sync_folder(folder);
    manifest_file.keep();
    index_file.keep();
    remove_if_there(path);
    sync_folder(folder);  // else a power cut may leave the new index and the old manifest
    index_file.commit();
    if (before_manifest) before_manifest();
  }
  manifest_file.commit();
}

namespace {

bool is_temporary_of(std::string_view name, std::string_view file) {
  return name.starts_with(fmt::format(".{}.tmp-", file));
}

bool has_bytes(const fs::path& path, int64_t bytes, const std::string& xxh3_128) {
  std::error_code error;
  const auto found = fs::file_size(path, error);
  return !error && found == static_cast<uintmax_t>(bytes) && file_xxh3_128(path) == xxh3_128;
}

}  // namespace

bool has_unfinished_publication(const fs::path& folder) {
  if (is_there(folder / kManifestName)) return false;
  return std::ranges::any_of(names_in(folder), [](const std::string& name) {
    return is_temporary_of(name, kManifestName);
  });
}

void finish_publication(const fs::path& folder) {
  if (!has_unfinished_publication(folder)) return;
  const auto names = names_in(folder);
  for (const auto& name : names) {
    if (!is_temporary_of(name, kManifestName)) continue;
    std::string text;
    Manifest manifest;
    try {
      text = read_file(folder / name);
      manifest = parse_manifest(text, folder / name);
    } catch (const Error&) {
      continue;  // torn
    }
    const bool segments = std::ranges::all_of(manifest.segments, [&](const SegmentEntry& entry) {
      std::error_code error;
      return fs::file_size(folder / entry.name, error) == static_cast<uintmax_t>(entry.bytes);
    });
    if (!segments) continue;
    if (!has_bytes(folder / kIndexName, manifest.index_bytes, manifest.index_xxh3_128)) {
      const auto index = std::ranges::find_if(names, [&](const std::string& other) {
        return is_temporary_of(other, kIndexName) &&
               has_bytes(folder / other, manifest.index_bytes, manifest.index_xxh3_128);
      });
      if (index == names.end()) continue;
      write_file_atomic(folder / kIndexName, read_file(folder / *index));
    }
    write_file_atomic(folder / kManifestName, text);
    return;
  }
}

void Folder::register_segment(SegmentFile file, std::span<const SampleInfo> samples) {
  const auto position = static_cast<uint32_t>(segments.size());
  for (size_t i = 0; i < samples.size(); ++i) {
    const SampleInfo& sample = samples[i];
    const Place place{
        position, static_cast<uint32_t>(i), sample.height, sample.width, sample.flags};
    const auto [found, is_new] = places.try_emplace(sample.key, place);
    if (!is_new && file.name < segments[found->second.segment].name) found->second = place;
  }
  segments.push_back(std::move(file));
}

void Folder::publish_segment(const SegmentHeader& header, std::span<const Record> records) {
  const auto bytes = encode_segment(header, records);
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

void Folder::publish_records(const SegmentHeader& header, std::span<const Record> records) {
  for (size_t begin = 0; begin < records.size();) {
    size_t end = begin;
    int64_t bytes = 0;
    while (end < records.size() && end - begin < static_cast<size_t>(kMaxSegmentSamples) &&
           (end == begin || bytes + frames_bytes(records[end]) <= kMaxSegmentBytes)) {
      bytes += frames_bytes(records[end++]);
    }
    publish_segment(header, records.subspan(begin, end - begin));
    begin = end;
  }
}

int64_t Folder::recover_journals(std::span<const std::string> names) {
  int64_t num_recovered = 0;
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
      publish_records(content.header, content.records);
      num_recovered += static_cast<int64_t>(content.records.size());
    }
    remove_if_there(path);
  }
  return num_recovered;
}

void Folder::refuse_kind(const fs::path& path, Kind kind) const {
  if (kind == recipe.kind) return;
  throw CacheError(fmt::format("{}: belongs to a {} cache, this run writes {}",
                               show(path),
                               kind_name(kind),
                               kind_name(recipe.kind)),
                   "give each cache a folder of its own");
}

bool Folder::publish_again() {
  const Manifest manifest = *previous;
  Publication publication;
  publication.items = items_of(previous_index);
  publication.plan = manifest.plan;
  publication.plan_digest = manifest.plan_digest;
  publication.quarantined = manifest.quarantined;
  return publish(publication, manifest.provenance);
}

bool Folder::publish(const Publication& publication, const nlohmann::json& provenance) {
  std::set<uint32_t> used;  // positions in segments
  std::set<Sha256Digest> keys;
  bool masks = false;
  for (const auto& item : publication.items) {
    for (const auto& variant : item.variants) {
      if (!wants(variant.key)) continue;
      const auto place = places.find(variant.key);
      if (place == places.end()) {
        throw std::invalid_argument(fmt::format(
            "sample {} of {} is not in the cache", to_hex(variant.key), printable(item.path)));
      }
      masks = masks || variant.flags & kSampleMasked;
      used.insert(place->second.segment);
      keys.insert(variant.key);
    }
  }
  std::vector<uint32_t> by_name(used.begin(), used.end());
  std::sort(by_name.begin(), by_name.end(), [&](uint32_t a, uint32_t b) {
    return segments[a].name < segments[b].name;
  });
  std::map<uint32_t, uint32_t> number;  // position in segments -> in the manifest

  Manifest manifest;
  for (const uint32_t position : by_name) {
    auto& file = segments[position];
    if (file.xxh3_128.empty()) file.xxh3_128 = xxh3_128_hex(MappedFile(folder / file.name).bytes());
    number[position] = static_cast<uint32_t>(manifest.segments.size());
    manifest.segments.push_back({file.name, file.bytes, file.xxh3_128, file.num_samples});
  }
  Index index;
  for (const auto& item : publication.items) {
    std::vector<IndexVariant> variants;
    for (const auto& variant : item.variants) {
      if (!wants(variant.key)) {
        variants.push_back({variant.key,
                            kOtherShard,
                            0,
                            variant.height,
                            variant.width,
                            variant.flags,
                            variant.weight});
        continue;
      }
      const auto& place = places.at(variant.key);
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
  manifest.recipe = recipe;
  if (masks) manifest.required_features = {kMasksFeature};
  manifest.plan = publication.plan;
  manifest.plan_digest = publication.plan_digest;
  manifest.num_samples = static_cast<int64_t>(keys.size());
  manifest.quarantined = publication.quarantined;
  for (auto& item : manifest.quarantined) {  // as it will be read
    item.path = printable(item.path);
    item.reason = printable(item.reason);
  }
  manifest.shard = shard;
  manifest.provenance = provenance;

  // An equal index keeps its file, whatever bytes this HDF5 library would write, so that the
  // manifest stays equal too.
  std::vector<std::byte> index_bytes;
  if (previous && previous_index == index) {
    manifest.index_bytes = previous->index_bytes;
    manifest.index_xxh3_128 = previous->index_xxh3_128;
  } else {
    index_bytes = encode_index(index, recipe.kind);
    manifest.index_bytes = static_cast<int64_t>(index_bytes.size());
    manifest.index_xxh3_128 = xxh3_128_hex(index_bytes);
  }
  wrote_quarantine = write_quarantine(folder, manifest.quarantined);
  if (previous && same_content(manifest, *previous)) return false;

  if (publication.late_notes) manifest.provenance.update(publication.late_notes());
  publish_files(folder, manifest_text(manifest), index_bytes);
  previous = std::move(manifest);
  previous_index = std::move(index);
  return true;
}

}  // namespace flux::cache
