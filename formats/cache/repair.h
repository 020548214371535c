// formats/cache/repair.h - drops from a damaged cache the samples that are damaged, and no others.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common/core/hash.h"

namespace flux::cache {

struct LostSample {
  std::optional<Sha256Digest> key;  // nothing: a file that cannot tell what it held
  std::string file;                 // the segment it was in
  /// Of the first item that wanted it, relative to its subset; else what the segment says (latents:
  /// path, text: caption); empty: unknown. Any bytes.
  std::string path;
  std::string reason;   // what is wrong with it; one line
  bool wanted = false;  // an item of the manifest's index wants it
};

struct RepairReport {
  int64_t num_samples = 0;       // that are good, in segments, afterwards
  int64_t recovered = 0;         // samples taken over from journals of killed writers
  int64_t salvaged = 0;          // good samples of damaged segments, moved to new ones
  int64_t removed_segments = 0;  // damaged ones
  std::vector<LostSample> lost;  // in the order of the segments' names and rows
  /// Manifest and index are there and whole afterwards. False: run the caching tool again, it
  /// encodes what was lost and nothing else.
  bool complete = false;
  /// What is wrong with the manifest or the index ("index.h5: ..."), where that is why the manifest
  /// had to go; one line.
  std::string unreadable;
  bool changed = false;  // whether anything in the folder had to be changed
};

/// Checks everything that verify_cache(deep) checks. Samples that do not verify are dropped; the
/// good ones of the same segment move into a new segment, the frames as they are; the damaged file is
/// removed. If a wanted sample was lost, or the index cannot be read, the manifest is removed, so that
/// nobody trains on what is left; the next run of the caching tool encodes exactly the lost samples.
/// The index cannot be made again here: subsets, repeats, paths and weights of the items are in the
/// data set and nowhere else; that run encodes nothing and writes both.
/// Else index and manifest are written anew if a segment changed. Journals of killed writers become
/// segments, temporary files go. A kill at any moment leaves what the same call completes; a cache
/// without damage stays as it is, times included.
///
/// `progress` gets bytes checked so far and in total, and may throw to end the work. Throws
/// CacheError: no such folder, nothing of a cache in it, a file with a name of ours that is not ours
/// (refuse_foreign_files), a segment that cannot be read (permissions), a newer schema, another
/// writer is at work, a reader lives (only where a file has to be removed). Throws ResourceError if a
/// write fails.
RepairReport repair_cache(const std::filesystem::path& folder,
                          const std::function<void(int64_t done, int64_t total)>& progress = {});

}  // namespace flux::cache
