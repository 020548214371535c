// formats/cache/writer.h - fills a cache folder so that a kill, a full disk or a second run loses
// nothing.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "formats/cache/index.h"
#include "formats/cache/manifest.h"
#include "formats/cache/schema.h"

namespace flux::cache {

/// One encoded form that an item needs.
struct WantedVariant {
  Sha256Digest key{};
  double weight = 1;
  uint32_t flags = 0;              // kSampleFlipped
  uint32_t height = 0, width = 0;  // rows and columns of the latents; 0 for text
};

/// One item of the data set and what must be there for it, at least one variant.
struct WantedItem {
  Sha256Digest item{};                          // SHA-256(subset index, path): the join's key
  uint32_t subset = 0, repeats = 1, flags = 0;  // kItem*
  std::string path;                             // relative to the subset's folder
  std::vector<WantedVariant> variants;
};

/// Distinct wanted samples by what happens to them. new_samples + changed is what has to be
/// encoded.
struct Comparison {
  int64_t kept = 0;         // in the folder already
  int64_t new_samples = 0;  // absent, and no item that wants it was in the last manifest
  int64_t changed = 0;      // absent, and an item that wants it was there with other samples
  int64_t unwanted = 0;     // in the folder, and no item wants it: left to flux-cache gc
  /// Of the changed samples: what differs from the one that their item had -> how many.
  /// "source_sha256", "bucket", "resized", "crop_top_left", "flip_aug", "alpha_mask", "mask", "caption", or a
  /// field of the recipe ("parameters.precision"). A sample counts for each of its fields.
  std::map<std::string, int64_t> changed_by;
  /// The recipe's and plan's fields that differ from the last manifest's: "parameters.resolution:
  /// 512x512, was 1024x1024".
  std::vector<std::string> changed_fields;
};

struct Publication {
  std::vector<WantedItem> items;
  nlohmann::json plan = nlohmann::json::object();
  std::string plan_digest;
  std::vector<Quarantined> quarantined;
  nlohmann::json stage_seconds = nlohmann::json::object();  // stage name -> seconds
  nlohmann::json notes =
      nlohmann::json::object();  // more members of the manifest's provenance, never compared
  std::function<nlohmann::json()> late_notes{};  // the same, asked for if a manifest is written
};

struct WriterOptions {
  /// Only samples of this part are wanted; the index names the others as kOtherShard.
  Shard shard;
  /// Checks the XXH3-128 of every segment that the last manifest names.
  bool verify_segments = false;
  /// Called under the lock with the manifest that is there, if any: may put more segments into the
  /// folder and returns them, with checksums that it knows to be right.
  std::function<std::vector<SegmentEntry>(const Manifest*)> adopt = {};
};

/// One writer a folder (lock file), used from one thread.
///
///   Writer writer(out, recipe, provenance);      // lock, finish what a killed run left
///   for (sample : wanted) if (!writer.contains(key)) writer.add(info, {latents});
///   writer.publish(publication);                 // seal, index, manifest
///
/// A sample is safe against SIGKILL when add() returns, and against power loss a second later. The
/// destructor leaves finished samples in the journal; seal(), publish() or the next Writer make a
/// segment of it.
///
/// Throws CacheError: another writer is at work, the folder holds another kind or a file that only
/// has the name of one of a cache's (refuse_foreign_files), a published segment is damaged. Throws
/// ResourceError: the disk is full, a write fails. A folder that is there and cannot be written is an
/// error only once something has to be: can_write().
/// Published segments stay intact.
class Writer {
 public:
  Writer(const std::filesystem::path& folder,
         const Recipe& recipe,
         const Provenance& provenance,
         const WriterOptions& options = {});
  ~Writer();
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  /// Whether the folder can be written. Where it cannot, what a killed run left stays as it is, and
  /// publish() of what the manifest says already is all that works.
  bool can_write() const;
  /// Throws ResourceError, and says why, if the folder cannot be written: before anything is encoded.
  void require_writable() const;
  /// Samples that a killed run had finished and this one sealed.
  int64_t num_recovered() const;
  /// The manifest that was there at the start, if any.
  const std::optional<Manifest>& previous() const;

  /// Whether a sample with this key is in the folder (published, or added since, sealed or not).
  bool contains(const Sha256Digest& key) const;
  /// Whether this writer's part of the cache is to hold that sample.
  bool wants(const Sha256Digest& key) const;
  /// Of all segments, and of what is not sealed yet with an allowance for its tables.
  int64_t num_bytes() const;
  /// `expected` tells what a sample that is not in the folder will say about itself; without it
  /// changed_by stays empty.
  Comparison compare(std::span<const WantedItem> items,
                     const nlohmann::json& plan = nullptr,
                     const std::function<SampleInfo(const Sha256Digest&)>& expected = {}) const;

  /// `tensors`: latents [channels, height, width], or T5 [L, X] and CLIP [V], little-endian, of the
  /// recipe's dtype. Adding a key that is there already does nothing. Throws std::invalid_argument
  /// for a wrong number of bytes.
  void add(const SampleInfo& info, std::span<const std::span<const std::byte>> tensors);
  /// The same for a sample that prepare() compressed, on another thread perhaps.
  void add(Record record);

  /// Makes a segment of what was added so far. For SIGINT and SIGTERM; publish() does it too.
  void seal();
  /// Seals, writes quarantine.jsonl, the index and then the manifest, unless the manifest there
  /// says the same. Returns whether it wrote. Throws std::invalid_argument if a wanted sample is
  /// not in the folder.
  bool publish(const Publication& publication);
  /// Removes the manifest and writes quarantine.jsonl: for a run in which too many items failed.
  void withdraw(std::span<const Quarantined> quarantined);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace flux::cache
