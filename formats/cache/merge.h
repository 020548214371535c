// formats/cache/merge.h - the parts of a cache made by several machines -> one whole cache.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "formats/cache/schema.h"

namespace flux::cache {

struct MergeReport {
  int64_t num_items = 0;        // of the result, without the record for dropped captions
  int64_t num_samples = 0;      // distinct wanted samples of the result
  int64_t num_segments = 0;     // of the result
  int64_t num_quarantined = 0;  // items that some part could not encode
  int64_t linked = 0;           // segments of the inputs that got a second name in `out`
  int64_t copied = 0;           // segments that could not be linked (another file system)
  int64_t already = 0;          // segments of the inputs that were in `out`
  int64_t copied_bytes = 0;
  int64_t duplicates = 0;  // wanted keys that several segments hold with the same bits
  int64_t conflicts = 0;   // wanted keys that several segments hold with different bits
  std::vector<std::string> conflict_keys;  // the first 20 of them, as "key path"
  bool changed = false;  // whether it wrote a manifest; false: `out` was this already
};

/// Makes `out` the whole cache of `inputs`: their segments linked, or copied where that fails; one
/// index; one manifest, written last, that says shard 0 of 1. Inputs are only read. They are parts
/// (shard i of n) or whole caches of the same kind, recipe (parameters, weights, tokenizers), plan
/// and items, complete, in any order, some perhaps twice; `out` is absent, empty, or holds an
/// earlier or interrupted merge, and is none of the inputs. An item that one part quarantined is
/// quarantined in the result. Of samples with one key the one in the segment whose name comes first
/// counts; if their bits differ that is a conflict, which `strict` refuses. Each segment's XXH3-128
/// is checked before its link counts. A kill at any moment leaves a folder that the same call
/// completes; a second call changes nothing. stage_seconds of the result are the parts' sums.
///
/// `provenance` tells who merges. `progress` gets bytes of segments done and in total. Throws
/// CacheError: an input is no complete cache, parts disagree (naming the field or the item), a part
/// is missing ("shard 1 of 3 is missing"), damaged, conflicts with `strict`, another writer is at
/// work in `out`, `out` holds another kind or a file that is not ours, an input has changed while it
/// was read. Throws UsageError if `out` is an input, ResourceError if a write fails.
MergeReport merge_caches(std::span<const std::filesystem::path> inputs,
                         const std::filesystem::path& out,
                         const Provenance& provenance,
                         bool strict,
                         const std::function<void(int64_t done, int64_t total)>& progress = {});

}  // namespace flux::cache
