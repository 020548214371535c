// formats/cache/copy.h - a cache on another disk.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>

namespace flux::cache {

struct CopyReport {
  int64_t num_samples = 0;   // distinct wanted samples of the copy
  int64_t num_segments = 0;  // that the manifest names
  int64_t copied = 0;        // segments copied by this call
  int64_t already = 0;       // segments that were there
  int64_t num_bytes = 0;     // of all files of the copy
  int64_t copied_bytes = 0;  // written by this call
  bool changed = false;      // whether it wrote anything
};

/// Copies what the manifest of `from` names: segments, quarantine.jsonl, index, and last the
/// manifest. Samples that no item wants stay behind. Each file appears under its name when it is
/// whole and on the disk; the XXH3-128 of what is copied is compared with the manifest's. `verify`
/// reads every file of the copy back from the disk, those that were there before too, and compares
/// again; a bad one that was there before is copied again. A kill at any moment leaves what the same
/// call completes without copying again what is there. `to` may hold an older copy: it is brought up
/// to date, segments that the new manifest does not name stay until gc.
///
/// `progress` gets bytes done and in total. Throws CacheError: `from` is no complete cache or is
/// damaged or has changed while it was read, `to` is the same folder, holds another kind or a file
/// that is not ours, another writer is at work in `to`, the copy does not read back (index and
/// segments are read back before there is a manifest). Throws ResourceError if a write fails.
CopyReport copy_cache(const std::filesystem::path& from,
                      const std::filesystem::path& to,
                      bool verify,
                      const std::function<void(int64_t done, int64_t total)>& progress = {});

}  // namespace flux::cache
