// formats/cache/folder.h - what all that change a cache folder share: which files are there, which
// samples are in them, and how they become a published cache. Internal to formats/cache.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "formats/cache/files.h"
#include "formats/cache/index.h"
#include "formats/cache/manifest.h"
#include "formats/cache/segment_reader.h"
#include "formats/cache/segment_writer.h"
#include "formats/cache/writer.h"

namespace flux::cache {

std::string utc_now();
/// Names of the folder's entries, sorted. Throws ResourceError.
std::vector<std::string> names_in(const std::filesystem::path& folder);
/// Throws ResourceError.
void remove_if_there(const std::filesystem::path& path);
void remove_temporary_files(const std::filesystem::path& folder);
/// Of compressed tensors.
int64_t frames_bytes(const Record& record);
/// The bytes of quarantine.jsonl; empty: there is to be no file.
std::string quarantine_text(std::span<const Quarantined> quarantined);
/// Returns whether the file had to be changed.
bool write_quarantine(const std::filesystem::path& folder,
                      std::span<const Quarantined> quarantined);
/// The message of an error about `path` without the path, the hint and line breaks.
std::string plain_message(const std::exception& error, const std::filesystem::path& path);
/// "KEY PATH" for lists of samples.
std::string sample_name(const Sha256Digest& key, std::string_view path);
/// XXH3-128 of a file. Throws CacheError if it cannot be read.
std::string file_xxh3_128(const std::filesystem::path& path);
/// What is wrong with a sample's tensors (frame, checksum, values that are not finite), in one line;
/// empty: nothing.
std::string sample_problem(const Segment& segment, int64_t row);
/// The items of an index as a writer takes them.
std::vector<WantedItem> items_of(const Index& index);

/// Puts a new manifest in place, and a new index unless `index_bytes` is empty, so that a kill in
/// between leaves no manifest with another index. `before_manifest` is called when a new index is
/// in place and the manifest is not: where it throws there is none. Throws ResourceError.
void publish_files(const std::filesystem::path& folder,
                   std::string_view manifest_text,
                   std::span<const std::byte> index_bytes,
                   const std::function<void()>& before_manifest = {});
/// Ends a publication that was killed behind the point where the old manifest was gone: both new
/// files are there and whole under their temporary names, or the index is published already. Else
/// does nothing. Under the writer's lock.
void finish_publication(const std::filesystem::path& folder);
/// Whether finish_publication might find something to end.
bool has_unfinished_publication(const std::filesystem::path& folder);

/// A folder's published segments and their samples.
struct Folder {
  struct SegmentFile {
    std::string name;
    int64_t bytes = 0, num_samples = 0;
    std::string xxh3_128;  // empty: not known yet
  };
  struct Place {
    uint32_t segment = 0, row = 0, height = 0, width = 0;  // segment: position in `segments`
    uint32_t flags = 0;
  };

  std::filesystem::path folder;
  Recipe recipe;
  Shard shard;
  std::optional<Manifest> previous;
  Index previous_index;
  std::vector<SegmentFile> segments;
  std::unordered_map<Sha256Digest, Place, DigestHash> places;

  bool wants(const Sha256Digest& key) const { return shard_of(key, shard.count) == shard.index; }
  /// Of samples with one key the one in the segment whose name comes first counts.
  void register_segment(SegmentFile file, std::span<const SampleInfo> samples);
  /// Writes a segment under a new name and registers it.
  void publish_segment(const SegmentHeader& header, std::span<const Record> records);
  /// publish_segment() for as many records as there are, in segments of the usual size.
  void publish_records(const SegmentHeader& header, std::span<const Record> records);
  /// Makes segments of the journals' samples that are not in `places`, and removes the journals.
  /// Returns how many samples. Throws CacheError for a journal of the other kind.
  int64_t recover_journals(std::span<const std::string> names);
  /// Throws CacheError unless `kind` is the recipe's.
  void refuse_kind(const std::filesystem::path& path, Kind kind) const;
  /// Writes quarantine.jsonl, index and manifest for `publication`, unless they say so already.
  /// `provenance` is the manifest's. Returns whether it wrote a manifest.
  bool publish(const Publication& publication, const nlohmann::json& provenance);
  /// publish() of what the manifest says already, for segments that have moved.
  bool publish_again();
  bool wrote_quarantine = false;  // by publish()
};

}  // namespace flux::cache
