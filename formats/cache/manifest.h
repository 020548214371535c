// formats/cache/manifest.h - manifest.json: what a whole cache holds and how it was made; written
// last.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "formats/cache/files.h"
#include "formats/cache/schema.h"

namespace flux::cache {

struct SegmentEntry {
  std::string name;  // "seg-0123456789abcdef.h5"
  int64_t bytes = 0;
  std::string xxh3_128;  // of the file, 32 hex digits
  int64_t num_samples = 0;

  bool operator==(const SegmentEntry&) const = default;
};

/// An item that could not be encoded; the join leaves it out.
struct Quarantined {
  Sha256Digest item{};
  uint32_t subset = 0;
  std::string path;    // relative to the subset's folder; made printable where written
  std::string reason;  // one line

  bool operator==(const Quarantined&) const = default;
};

/// Part `index` (from 0) of `count`; 0 of 1 is everything.
struct Shard {
  int64_t index = 0, count = 1;
  bool operator==(const Shard&) const = default;
};

struct Manifest {
  std::vector<std::string> required_features;  // kMasksFeature, or none
  Recipe recipe;
  nlohmann::json plan =
      nlohmann::json::object();        // the resolved data set; common/dataset knows what is in it
  std::string plan_digest;             // 64 hex digits; both caches of a training run must agree
  std::vector<SegmentEntry> segments;  // that hold wanted samples, sorted by name
  int64_t index_bytes = 0;
  std::string index_xxh3_128;
  int64_t num_items = 0;    // wanted items (rows of the index without kItemEmptyCaption)
  int64_t num_samples = 0;  // distinct wanted samples
  std::vector<Quarantined> quarantined;
  Shard shard;
  /// Of the last run that changed the content: tool, tool_version, command_line, device, created
  /// (UTC, RFC 3339), stage_seconds {name: seconds} and what the tool adds (FORMAT.md section 6
  /// names it); never compared.
  nlohmann::json provenance = nlohmann::json::object();
};

/// The canonical text of FORMAT.md section 6, with its checksum.
std::string manifest_text(const Manifest& manifest);
/// Throws CacheError naming `path`, the field, and what it holds and should hold.
Manifest parse_manifest(std::string_view text, const std::filesystem::path& path);
/// Of the cache in `folder`. Throws CacheError: absent ("the cache is not complete"), not ours,
/// newer, damaged.
Manifest read_manifest(const std::filesystem::path& folder);
/// Nothing if there is no manifest.json; throws as read_manifest does otherwise.
std::optional<Manifest> read_manifest_if_there(const std::filesystem::path& folder);
/// Equal but for provenance.
bool same_content(const Manifest& a, const Manifest& b);

/// Canonical JSON on one line: members sorted by name, no spaces. For comparing and hashing.
std::string canonical_json(const nlohmann::json& value);
/// One field in which two values differ.
struct FieldDifference {
  std::string field;            // "plan.subsets.1.num_repeats"
  std::string found, expected;  // as JSON, safe to print, cut where it is long; "nothing": absent
};
/// All fields in which two values differ. `what` is the name of the values compared ("parameters");
/// members of objects and elements of lists are compared one by one.
std::vector<FieldDifference> field_differences(std::string_view what,
                                               const nlohmann::json& found,
                                               const nlohmann::json& expected);
/// The same as texts: "parameters.t5_length: cache/text: 256, this run: 512".
std::vector<std::string> differences(std::string_view what,
                                     const nlohmann::json& found,
                                     std::string_view found_name,
                                     const nlohmann::json& expected,
                                     std::string_view expected_name);
/// Throws CacheError unless there are none: "caches do not fit: ", the first five with both values,
/// a line each, and the names of the rest ("and 3 more: a, b, c").
void refuse_differences(const std::vector<FieldDifference>& differences,
                        std::string_view found_name,
                        std::string_view expected_name,
                        std::string_view hint);
/// refuse_differences() of two values.
void require_equal(std::string_view what,
                   const nlohmann::json& found,
                   std::string_view found_name,
                   const nlohmann::json& expected,
                   std::string_view expected_name,
                   std::string_view hint = {});
/// The fields in which two resolved data sets differ, plan and digest.
std::vector<FieldDifference> plan_differences(const Manifest& found, const Manifest& expected);
/// Throws CacheError unless a latents and a text cache can be joined: kinds, plan digest (naming
/// the plan's fields that differ), neither a shard of several.
void require_joinable(const Manifest& latents,
                      std::string_view latents_name,
                      const Manifest& text,
                      std::string_view text_name);

}  // namespace flux::cache
