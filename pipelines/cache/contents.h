// pipelines/cache/contents.h - what lies in a cache folder, found without a lock and without
// changing anything: a whole cache, one that is being written, or what a killed writer left.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "formats/cache/index.h"
#include "formats/cache/manifest.h"
#include "formats/cache/schema.h"
#include "formats/cache/segment_writer.h"

namespace flux::cache {

/// One sample of the folder.
struct ListedSample {
  SampleInfo info;
  std::string file;  // segment or journal that holds it
  int64_t row = -1;  // sample of that segment; -1 in a journal
  /// Latents: the path of the first item that wants it, else the path it was encoded from. Text:
  /// the path of the first item that wants it, if there is one.
  std::optional<std::string> path = std::nullopt;
};

struct SegmentSummary {
  std::string name;
  int64_t bytes = 0, num_samples = 0;
  SegmentHeader header;
};
struct JournalSummary {
  std::string name;
  int64_t bytes = 0;        // of the file
  int64_t num_samples = 0;  // whole records
  int64_t torn_bytes = 0;   // behind the last whole record
};

struct Contents {
  std::filesystem::path folder;
  std::optional<Kind> kind;          // nothing in a folder that holds nothing yet
  std::optional<Manifest> manifest;  // if there is one that can be read
  std::optional<Index> index;        // of that manifest
  /// The manifest, its index and its segments are there and agree.
  bool complete = false;
  std::vector<std::string> problems;  // files that cannot be read, and why
  std::string hint;                   // what to do about the first of them
  std::vector<SegmentSummary> segments;
  std::vector<JournalSummary> journals;
  /// With a manifest, the samples it wants; else all of the segments. With `recover` also those of
  /// the journals, and of segments sealed after the manifest by a run that did not end. Each key
  /// once.
  std::vector<ListedSample> samples;
  /// With a manifest, samples of segments that flux-cache gc would remove: wanted by no item, or of
  /// another shard, or there a second time.
  int64_t num_unwanted = 0;
  int64_t num_in_journals = 0;                   // distinct keys in journals and in no segment
  int64_t num_bytes = 0;                         // all files of the format
  int64_t segment_bytes = 0, decoded_bytes = 0;  // of all segments: the files, tensors decoded
  SegmentHeader header;  // of the manifest, else of the newest segment or journal
};

/// `recover` counts and lists what journals hold. A file of the other kind than the manifest, or the
/// first file without one, is a problem. Throws CacheError: no such folder, nothing of a cache among
/// other files, a schema that this build does not read.
Contents look_into(const std::filesystem::path& folder, bool recover);

/// Member `name` of `object`, or `otherwise` where it is absent or of another type: manifests are
/// users' files.
template <class T>
T value_of(const nlohmann::json& object, const char* name, T otherwise) {
  if (!object.is_object()) return otherwise;
  const auto found = object.find(name);
  if (found == object.end()) return otherwise;
  try {
    return found->template get<T>();
  } catch (const nlohmann::json::exception&) {
    return otherwise;
  }
}

/// For verbs that take one folder. Throws UsageError, whose hint is `example`.
void require_one_folder(const std::vector<std::string>& folders, const char* example);

/// "512x768": width x height in pixels of the latents' picture.
std::string bucket_text(uint32_t height, uint32_t width);

}  // namespace flux::cache
