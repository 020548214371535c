#include "formats/cache/merge.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <memory>
#include <set>
#include <system_error>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/folder.h"
#include "formats/cache/index.h"
#include "formats/cache/lock.h"
#include "formats/cache/manifest.h"
#include "formats/cache/segment_reader.h"
#include "formats/cache/writer.h"

namespace flux::cache {
namespace fs = std::filesystem;
namespace {

using Progress = std::function<void(int64_t, int64_t)>;

struct Part {
  fs::path folder;
  Manifest manifest;
};

// A segment of the parts and the folders that have it under this name.
struct Source {
  fs::path folder;
  SegmentEntry entry;
};

void require_same_recipe(const Part& part, const Part& first) {
  const Manifest &a = part.manifest, &b = first.manifest;
  const std::string a_name = show(part.folder), b_name = show(first.folder);
  constexpr char kHint[] = "merge only parts that were made with the same flags and files";
  std::vector<FieldDifference> all;
  const auto append = [&](const std::vector<FieldDifference>& some) {
    all.insert(all.end(), some.begin(), some.end());
  };
  append(field_differences("kind", kind_name(a.recipe.kind), kind_name(b.recipe.kind)));
  append(field_differences("parameters", a.recipe.parameters, b.recipe.parameters));
  append(field_differences("weights", a.recipe.weights, b.recipe.weights));
  append(field_differences("tokenizers", a.recipe.tokenizers, b.recipe.tokenizers));
  append(plan_differences(a, b));
  refuse_differences(all, a_name, b_name, kHint);
}

// Some number of parts has all of them, so that no item and no bad image can be missing.
void require_all_shards(const std::vector<Part>& parts) {
  std::map<int64_t, std::set<int64_t>> found;  // count -> indices
  for (const Part& part : parts) found[part.manifest.shard.count].insert(part.manifest.shard.index);
  std::string missing;
  for (const auto& [count, indices] : found) {
    if (std::ssize(indices) == count) return;
    constexpr int64_t kMost = 20;
    int64_t named = 0;
    for (int64_t i = 0; i < count && named < kMost; ++i) {
      if (indices.contains(i)) continue;
      missing +=
          fmt::format("{}shard {} of {} is missing", missing.empty() ? "" : "\n  ", i, count);
      ++named;
    }
    const int64_t more = count - std::ssize(indices) - named;
    if (more > 0) missing += fmt::format("\n  and {} more", more);
  }
  throw CacheError(missing, "make it with --shard and the same flags, and name its folder too");
}

// The union of the parts' bad items; of one item's reasons the first by its text, whatever the
// order of the parts.
std::vector<Quarantined> all_quarantined(const std::vector<Part>& parts) {
  std::map<Sha256Digest, Quarantined> by_item;
  for (const Part& part : parts) {
    for (const Quarantined& item : part.manifest.quarantined) {
      const auto [found, is_new] = by_item.try_emplace(item.item, item);
      if (!is_new && item.reason < found->second.reason) found->second = item;
    }
  }
  std::vector<Quarantined> out;
  for (auto& [key, item] : by_item) out.push_back(std::move(item));
  std::ranges::sort(out, {}, [](const Quarantined& item) {
    return std::tuple(item.subset, item.path, item.item);
  });
  return out;
}

std::string item_name(const WantedItem& item) {
  return fmt::format("item {} (subset {}, {})",
                     to_hex(item.item).substr(0, 16),
                     item.subset,
                     item.path.empty() ? "without a path" : printable(item.path));
}

// Throws CacheError naming the first item in which two parts differ.
void require_same_items(const std::vector<WantedItem>& a,
                        const Part& a_part,
                        const std::vector<WantedItem>& b,
                        const Part& b_part) {
  constexpr char kHint[] = "make all parts from the same dataset file and the same images";
  const auto refuse = [&](const std::string& text) { throw CacheError(text, kHint); };
  const auto require_there = [&](const std::vector<WantedItem>& from,
                                 const Part& from_part,
                                 const std::vector<WantedItem>& in,
                                 const Part& in_part) {
    std::unordered_set<Sha256Digest, DigestHash> there;
    for (const auto& item : in) there.insert(item.item);
    std::string names;
    int64_t count = 0;
    for (const auto& item : from) {
      if (there.contains(item.item)) continue;
      if (count++ < 5) names += fmt::format("{}{}", names.empty() ? "" : "\n  ", item_name(item));
    }
    if (count == 0) return;
    if (count > 5) names += fmt::format("\n  and {} more", count - 5);
    refuse(fmt::format("caches do not fit: {} has {} that {} lacks:\n  {}",
                       show(from_part.folder),
                       count == 1 ? "an item" : fmt::format("{} items", count),
                       show(in_part.folder),
                       names));
  };
  require_there(a, a_part, b, b_part);
  require_there(b, b_part, a, a_part);
  for (size_t i = 0; i < a.size(); ++i) {
    const char* field = nullptr;
    if (a[i].item != b[i].item)
      field = "place";
    else if (a[i].subset != b[i].subset)
      field = "subset";
    else if (a[i].repeats != b[i].repeats)
      field = "repeats";
    else if (a[i].flags != b[i].flags)
      field = "flags";
    else if (a[i].path != b[i].path)
      field = "path";
    else if (!std::ranges::equal(
                 a[i].variants, b[i].variants, {}, &WantedVariant::key, &WantedVariant::key))
      field = "key of a sample";
    else if (!std::ranges::equal(
                 a[i].variants, b[i].variants, {}, &WantedVariant::weight, &WantedVariant::weight))
      field = "weight of a sample";
    else if (!std::ranges::equal(
                 a[i].variants, b[i].variants, {}, &WantedVariant::flags, &WantedVariant::flags))
      field = "flags of a sample";
    if (field) {
      refuse(fmt::format("caches do not fit: {} has another {} in {} than in {}",
                         item_name(a[i]),
                         field,
                         show(a_part.folder),
                         show(b_part.folder)));
    }
  }
}

void check_source(const Source& source) {
  const fs::path path = source.folder / source.entry.name;
  const std::string found = file_xxh3_128(path);
  if (found == source.entry.xxh3_128) return;
  throw CacheError(fmt::format("{}: is damaged: XXH3-128 {}, the manifest says {}",
                               show(path),
                               found,
                               source.entry.xxh3_128),
                   repair_hint(source.folder));
}

bool same_file(const fs::path& a, const fs::path& b) {
  std::error_code error;
  return fs::equivalent(a, b, error) && !error;
}

// Gives `source` a name in `out`. A segment there under this name has to be the same.
void bring(const Source& source, const fs::path& out, const Manifest* known, MergeReport& report) {
  const fs::path from = source.folder / source.entry.name, to = out / source.entry.name;
  if (is_there(to)) {
    ++report.already;
    // what the last merge checked need not be read again
    const auto is_known = [&](const SegmentEntry& entry) { return entry == source.entry; };
    std::error_code error;
    if (known && std::ranges::any_of(known->segments, is_known) &&
        fs::file_size(to, error) == static_cast<uintmax_t>(source.entry.bytes)) {
      return;
    }
    const std::string found = file_xxh3_128(to);
    if (found == source.entry.xxh3_128) return;
    throw CacheError(fmt::format("{}: XXH3-128 {}, the segment of this name in {} has {}",
                                 show(to),
                                 found,
                                 show(source.folder),
                                 source.entry.xxh3_128),
                     repair_hint(out));
  }
  check_source(source);
  if (link(from.c_str(), to.c_str()) == 0) {
    ++report.linked;
    return;
  }
  const int number = errno;
  constexpr int kNoLinksHere[] = {EXDEV, EPERM, EMLINK, ENOTSUP, ENOSYS, EACCES};
  if (std::ranges::find(kNoLinksHere, number) == std::end(kNoLinksHere)) {
    throw ResourceError(
        fmt::format("{}: cannot be made: {}", show(to), std::generic_category().message(number)),
        write_failure_hint(number));
  }
  const MappedFile bytes(from);
  AtomicFile file(to);
  file.write(bytes.bytes());
  file.commit_new();
  ++report.copied;
  report.copied_bytes += source.entry.bytes;
}

// What the parts' manifests tell about their runs, added up.
nlohmann::json summed_seconds(const std::vector<Part>& parts) {
  nlohmann::json sum = nlohmann::json::object();
  for (const Part& part : parts) {
    const auto& provenance = part.manifest.provenance;
    const auto seconds = provenance.find("stage_seconds");
    if (seconds == provenance.end() || !seconds->is_object()) continue;
    for (const auto& [stage, value] : seconds->items()) {
      if (value.is_number()) sum[stage] = sum.value(stage, 0.0) + value.get<double>();
    }
  }
  return sum;
}

MergeReport merge(std::span<const fs::path> inputs,
                  const fs::path& out,
                  const Provenance& provenance,
                  bool strict,
                  const Progress& progress) {
  MergeReport report;
  std::vector<Part> parts;
  for (const fs::path& folder : inputs) {
    const bool again = std::ranges::any_of(
        parts, [&](const Part& part) { return same_file(part.folder, folder); });
    if (again) continue;
    parts.push_back({folder, read_manifest(folder)});
    require_same_recipe(parts.back(), parts.front());
  }
  if (parts.empty()) throw UsageError("no caches to merge");
  require_all_shards(parts);

  Publication publication;
  publication.plan = parts[0].manifest.plan;
  publication.plan_digest = parts[0].manifest.plan_digest;
  publication.quarantined = all_quarantined(parts);
  publication.stage_seconds = summed_seconds(parts);
  for (const Part& part : parts) {  // text: captions cut off, which each part counts for all
    const auto truncated = part.manifest.provenance.find("truncated");
    if (truncated == part.manifest.provenance.end()) continue;
    publication.notes["truncated"] = *truncated;
    break;
  }
  std::unordered_set<Sha256Digest, DigestHash> bad;
  for (const auto& item : publication.quarantined) bad.insert(item.item);
  std::unordered_set<Sha256Digest, DigestHash> placed;
  for (const Part& part : parts) {
    const Index index = read_index_of(part.folder, part.manifest);
    for (const auto& variant : index.variants()) {
      if (variant.segment != kOtherShard) placed.insert(variant.key);
    }
    std::vector<WantedItem> items = items_of(index);
    std::erase_if(items, [&](const WantedItem& item) { return bad.contains(item.item); });
    if (&part == &parts[0])
      publication.items = std::move(items);
    else
      require_same_items(items, part, publication.items, parts[0]);
  }
  std::unordered_map<Sha256Digest, std::string_view, DigestHash> wanted;  // key -> path
  for (const auto& item : publication.items) {
    for (const auto& variant : item.variants) {
      wanted.try_emplace(variant.key, item.path);
      if (placed.contains(variant.key)) continue;
      int64_t count = 1;
      for (const Part& part : parts) count = std::max(count, part.manifest.shard.count);
      throw CacheError(fmt::format("sample {} of {} is in no part; it belongs to shard {} of {}",
                                   to_hex(variant.key),
                                   printable(item.path),
                                   shard_of(variant.key, count),
                                   count),
                       "run the caching tool again for that shard");
    }
  }
  std::map<std::string, Source> sources;
  int64_t total_bytes = 0, done_bytes = 0;
  for (const Part& part : parts) {
    for (const auto& entry : part.manifest.segments) {
      const auto [found, is_new] = sources.try_emplace(entry.name, Source{part.folder, entry});
      if (is_new) total_bytes += entry.bytes;
      if (found->second.entry == entry) continue;
      throw CacheError(fmt::format("{} is another file in {} than in {}",
                                   entry.name,
                                   show(part.folder),
                                   show(found->second.folder)),
                       "run flux-cache verify on both, and name the whole one alone");
    }
  }
  struct Held {
    uint64_t tensor_xxh3 = 0;
    bool twice = false, differs = false;
  };
  std::unordered_map<Sha256Digest, Held, DigestHash> held;
  for (const auto& [segment_name, merged] : sources) {
    const auto& name = segment_name;  // C++20 lambdas of clang capture no structured bindings
    const auto& source = merged;
    const auto segment = with_repair_hint(
        source.folder, [&] { return std::make_unique<const Segment>(source.folder / name); });
    for (const SampleInfo& sample : segment->samples()) {
      if (!wanted.contains(sample.key)) continue;
      const auto [found, is_new] = held.try_emplace(sample.key, Held{sample.tensor_xxh3});
      if (is_new) continue;
      found->second.twice = true;
      found->second.differs |= found->second.tensor_xxh3 != sample.tensor_xxh3;
    }
  }
  std::set<std::string> conflicts;  // in an order that does not depend on the hash table
  for (const auto& [key, sample] : held) {
    if (sample.differs)
      conflicts.insert(sample_name(key, wanted.at(key)));
    else if (sample.twice)
      ++report.duplicates;
  }
  report.conflicts = std::ssize(conflicts);
  for (const auto& name : conflicts) {
    if (report.conflict_keys.size() < 20) report.conflict_keys.push_back(name);
  }
  if (strict && report.conflicts > 0) {
    throw CacheError(fmt::format("{} {} with different bits in the parts, the first is {}",
                                 report.conflicts,
                                 report.conflicts == 1 ? "sample is there" : "samples are there",
                                 report.conflict_keys[0]),
                     "make all parts on the same kind of device, or merge without --strict");
  }

  WriterOptions options;
  options.adopt = [&](const Manifest* known) {
    std::vector<SegmentEntry> entries;
    for (const auto& [name, source] : sources) {
      bring(source, out, known, report);
      entries.push_back(source.entry);
      done_bytes += source.entry.bytes;
      if (progress) progress(done_bytes, total_bytes);
    }
    if (report.linked > 0) sync_folder(out);
    return entries;
  };
  std::error_code not_there;
  if (fs::is_directory(out, not_there) && has_unfinished_publication(out)) {
    const WriterLock lock(out);
    finish_publication(out);
  }
  Writer writer(out, parts[0].manifest.recipe, provenance, options);
  report.changed = writer.publish(publication);
  const Manifest result = read_manifest(out);
  report.num_items = result.num_items;
  report.num_samples = result.num_samples;
  report.num_segments = std::ssize(result.segments);
  report.num_quarantined = std::ssize(result.quarantined);
  return report;
}

}  // namespace

MergeReport merge_caches(std::span<const fs::path> inputs,
                         const fs::path& out,
                         const Provenance& provenance,
                         bool strict,
                         const Progress& progress) {
  for (const fs::path& input : inputs) {
    if (!same_file(input, out)) continue;
    throw UsageError(fmt::format("{}: is one of the parts; parts stay as they are", show(out)),
                     "name another folder with --out");
  }
  refuse_foreign_files(out);
  MergeReport report;
  read_unchanged({inputs.begin(), inputs.end()},
                 [&] { report = merge(inputs, out, provenance, strict, progress); });
  return report;
}

}  // namespace flux::cache
