#include "formats/cache/verify.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/folder.h"
#include "formats/cache/header.h"
#include "formats/cache/index.h"
#include "formats/cache/manifest.h"
#include "formats/cache/segment_reader.h"

namespace flux::cache {
namespace fs = std::filesystem;
namespace {

class Verifier {
 public:
  Verifier(const fs::path& folder, const std::function<void(int64_t, int64_t)>& progress)
      : folder_(folder), progress_(progress) {}

  std::vector<Finding> run(bool deep) {
    require_folder(folder_);
    refuse_foreign_manifest(folder_);
    if (!is_there(folder_ / kManifestName)) read_manifest(folder_);  // throws: no cache
    names_ = names_in(folder_);
    for (const auto& name : names_) {
      if (is_segment_name(name)) disk_bytes_ += file_bytes(name).value_or(0);
    }
    attempt(kManifestName, [&] { manifest_ = read_manifest(folder_); });
    total_ = deep ? disk_bytes_ : 0;
    if (manifest_) {
      total_ += manifest_->index_bytes;
      for (const auto& entry : manifest_->segments) total_ += entry.bytes;
      check_quarantine();
      if (check_file(kIndexName, manifest_->index_bytes, manifest_->index_xxh3_128)) {
        attempt(kIndexName,
                [&] { index_ = read_index(folder_ / kIndexName, manifest_->recipe.kind); });
      }
      if (index_) check_index();
      for (const auto& entry : manifest_->segments)
        check_file(entry.name, entry.bytes, entry.xxh3_128);
    }
    if (deep) check_samples();
    std::ranges::stable_sort(findings_, {}, &Finding::file);
    return std::move(findings_);
  }

 private:
  void find(std::string_view file, std::string sample, std::string what) {
    findings_.push_back({std::string(file), std::move(sample), std::move(what)});
  }

  // What `check` throws about `file` is a finding, but for a schema that this build does not know and
  // a file that may not be read: whether these are whole cannot be told.
  template <class Check>
  void attempt(std::string_view file, Check check, const std::string& sample = {}) {
    try {
      check();
    } catch (const SchemaError&) {
      throw;
    } catch (const UnreadableError&) {
      throw;
    } catch (const Error& error) {
      find(file, sample, plain_message(error, folder_ / file));
    }
  }

  void advance(int64_t bytes) {
    done_ += bytes;
    if (progress_) progress_(done_, total_);
  }

  std::optional<int64_t> file_bytes(std::string_view name) const {
    std::error_code error;
    const auto bytes = fs::file_size(folder_ / name, error);
    if (error) return std::nullopt;
    return static_cast<int64_t>(bytes);
  }

  // Whether it is the file that the manifest names.
  bool check_file(const std::string& name, int64_t bytes, const std::string& xxh3_128) {
    const size_t before = findings_.size();
    const auto found = file_bytes(name);
    if (!found) {
      find(name, {}, "is absent or cannot be read; the manifest names it");
    } else if (*found != bytes) {
      find(name, {}, fmt::format("has {} bytes, the manifest says {}", *found, bytes));
    } else {
      attempt(name, [&] {
        const std::string hash = file_xxh3_128(folder_ / name);
        if (hash != xxh3_128)
          find(name, {}, fmt::format("XXH3-128 {}, the manifest says {}", hash, xxh3_128));
      });
    }
    advance(bytes);
    return findings_.size() == before;
  }

  void check_quarantine() {
    const std::string expected = quarantine_text(manifest_->quarantined);
    attempt(kQuarantineName, [&] {
      const fs::path path = folder_ / kQuarantineName;
      refuse_unreadable(path);
      const std::string found = is_there(path) ? read_file(path) : std::string();
      if (found != expected) {
        find(kQuarantineName,
             {},
             fmt::format("is not the list of the {} quarantined items of the manifest",
                         manifest_->quarantined.size()));
      }
    });
  }

  // The index by itself and against the manifest.
  void check_index() {
    std::set<Sha256Digest> keys, items;
    std::set<Sha256Digest> bad;
    for (const auto& item : manifest_->quarantined) bad.insert(item.item);
    int64_t num_items = 0;
    bool masks = false;
    for (int64_t i = 0; i < index_->num_items(); ++i) {
      const IndexItem& item = index_->item(i);
      num_items += !(item.flags & kItemEmptyCaption);
      const auto about = [&](const std::string& what) {
        find(kIndexName,
             {},
             fmt::format("item {} ({}) {}", i, printable(std::string(index_->path(i))), what));
      };
      if (!items.insert(item.item).second) about("is there twice");
      if (bad.contains(item.item)) about("is quarantined");
      double weight = 0;
      for (const auto& variant : index_->variants(i)) {
        weight += variant.weight;
        if (variant.segment == kOtherShard && manifest_->shard.count > 1) {
          if (shard_of(variant.key, manifest_->shard.count) == manifest_->shard.index)
            about(fmt::format("lacks the sample {}, which is this shard's", to_hex(variant.key)));
          continue;
        }
        masks = masks || variant.flags & kSampleMasked;
        keys.insert(variant.key);
        if (variant.segment >= manifest_->segments.size()) {
          about(fmt::format("names segment {} of {}", variant.segment, manifest_->segments.size()));
        } else if (variant.row >= manifest_->segments[variant.segment].num_samples) {
          about(fmt::format("names sample {} of {} in {}",
                            variant.row,
                            manifest_->segments[variant.segment].num_samples,
                            manifest_->segments[variant.segment].name));
        }
        wanted_.try_emplace(variant.key, std::string(index_->path(i)));
      }
      if (!(weight > 1 - 1e-6 && weight < 1 + 1e-6))
        about(fmt::format("has weights that sum to {}, expected 1", weight));
    }
    const auto compare = [&](const char* field, int64_t says, int64_t found) {
      if (says != found)
        find(kManifestName, {}, fmt::format("'{}' is {}, the index has {}", field, says, found));
    };
    compare("num_items", manifest_->num_items, num_items);
    compare("num_samples", manifest_->num_samples, std::ssize(keys));
    if (masks && manifest_->required_features.empty())
      find(kManifestName, {}, "samples have masks, but the feature 'masks' is not required");
  }

  void check_samples() {
    std::map<std::string, uint32_t> numbers;  // segment -> its number in the manifest
    if (manifest_) {
      for (const auto& entry : manifest_->segments)
        numbers[entry.name] = static_cast<uint32_t>(numbers.size());
    }
    std::map<uint32_t, std::vector<const IndexVariant*>> variants;  // of each segment
    if (index_) {
      for (const auto& variant : index_->variants()) variants[variant.segment].push_back(&variant);
    }
    for (const auto& name : names_) {
      if (!is_segment_name(name)) continue;
      attempt(name, [&] {
        const Segment segment(folder_ / name);
        const auto number = numbers.find(name);
        check_segment(name, segment, number != numbers.end());
        if (number == numbers.end()) return;
        for (const IndexVariant* variant : variants[number->second])
          check_variant(*variant, segment);
      });
      advance(file_bytes(name).value_or(0));
    }
  }

  void check_segment(const std::string& name, const Segment& segment, bool is_named) {
    if (manifest_) {
      const Layout layout = layout_of(manifest_->recipe.kind, manifest_->recipe.parameters);
      if (segment.layout().kind != layout.kind) {
        find(name, {}, fmt::format("belongs to a {} cache", kind_name(segment.layout().kind)));
      } else if (is_named && segment.layout() != layout) {
        find(name, {}, "has tensors of another shape or type than the manifest says");
      }
      const auto entry = std::ranges::find(manifest_->segments, name, &SegmentEntry::name);
      if (is_named && entry->num_samples != segment.num_samples()) {
        find(
            name,
            {},
            fmt::format(
                "has {} samples, the manifest says {}", segment.num_samples(), entry->num_samples));
      }
    }
    for (int64_t row = 0; row < segment.num_samples(); ++row) {
      const SampleInfo& sample = segment.samples()[static_cast<size_t>(row)];
      const auto path = wanted_.find(sample.key);
      const std::string label =
          sample_name(sample.key, path == wanted_.end() ? sample.text : path->second);
      const std::string problem = sample_problem(segment, row);
      if (!problem.empty()) find(name, label, problem);
    }
  }

  void check_variant(const IndexVariant& variant, const Segment& segment) {
    if (variant.row >= segment.samples().size()) return;  // named already
    const SampleInfo& sample = segment.samples()[variant.row];
    if (sample.key == variant.key && sample.height == variant.height &&
        sample.width == variant.width && sample.flags == variant.flags) {
      return;
    }
    const auto shown = [](const auto& s) {
      return fmt::format("{} ({} x {}, flags {})", to_hex(s.key), s.height, s.width, s.flags);
    };
    find(kIndexName,
         sample_name(variant.key, wanted_.at(variant.key)),
         fmt::format("sample {} of {} is {}, the index says {}",
                     variant.row,
                     segment.path().filename().native(),
                     shown(sample),
                     shown(variant)));
  }

  fs::path folder_;
  std::function<void(int64_t, int64_t)> progress_;
  std::vector<std::string> names_;
  std::optional<Manifest> manifest_;
  std::optional<Index> index_;
  std::unordered_map<Sha256Digest, std::string, DigestHash> wanted_;  // key -> path
  std::vector<Finding> findings_;
  int64_t disk_bytes_ = 0, total_ = 0, done_ = 0;
};

}  // namespace

std::vector<Finding> verify_cache(const fs::path& folder,
                                  bool deep,
                                  const std::function<void(int64_t, int64_t)>& progress) {
  return Verifier(folder, progress).run(deep);
}

}  // namespace flux::cache
