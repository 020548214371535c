// formats/cache/gc.h - removes from a cache what its manifest does not want.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace flux::cache {

struct GcReport {
  int64_t kept_samples = 0;        // distinct wanted samples, all that is left
  int64_t removed_samples = 0;     // samples of segments and journals that are gone
  int64_t removed_segments = 0;    // whole segments that no item wants
  int64_t rewritten_segments = 0;  // replaced by a smaller one with the wanted samples alone
  int64_t removed_others = 0;  // journals and temporary files of the dead, locks of dead readers
  int64_t bytes_before = 0, bytes_after = 0;  // of all files of the format
  std::vector<std::string> removed;           // names of the files, sorted
};

/// Leaves exactly the samples that the manifest wants. Segments without one are removed; those with
/// wanted and other samples are written again, the frames as they are; then a new index and manifest
/// are published, the readers looked for again, and only then files removed. Journals go too: what a
/// killed run had finished and no manifest wants is lost, so let that run end first. A kill at any
/// moment leaves a whole cache and what the same call completes. The manifest stays, time included,
/// where it names nothing that goes. `dry_run` tells what would happen and changes nothing;
/// bytes_after is then an estimate.
///
/// `progress` gets bytes of segments looked into, and of those read to be written again, so far and
/// in total; it may throw to end the work, and is not called any more once something is removed.
/// Throws CacheError: no complete cache, a file that is not ours, a reader lives or cannot be judged
/// (naming it), another writer is at work, a segment is damaged. Throws ResourceError if a write
/// fails.
GcReport collect_garbage(const std::filesystem::path& folder,
                         bool dry_run,
                         const std::function<void(int64_t done, int64_t total)>& progress = {});

}  // namespace flux::cache
