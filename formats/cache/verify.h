// formats/cache/verify.h - is every byte of a cache what its manifest and its samples say?
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace flux::cache {

/// One thing that is wrong.
struct Finding {
  std::string file;  // name in the folder: "seg-0123456789abcdef.h5"
  std::string
      sample;  // key (64 hex digits) and, where the index knows it, path; empty: the file as a whole
  std::string what;  // "XXH3-128 ..., the manifest says ..."; one line, without the file's name

  bool operator==(const Finding&) const = default;
};

/// Plain: the manifest (checksum, members, counts), the size and the XXH3-128 of every
/// segment that it names and of the index, quarantine.jsonl against the manifest. `deep` also
/// decodes every sample of every segment of the folder, wanted or not: frame checksums, tensor_xxh3,
/// values that are not finite, masks outside 0 to 1; and compares keys, rows, buckets and flags of
/// the index with the segments. Goes on behind what is wrong, so the list is complete; in the order
/// of the files' names, empty where all is right. Takes no lock and changes nothing.
///
/// `progress` gets bytes checked so far and in total. Throws CacheError where there is no cache to
/// check: no folder, no manifest, a newer schema.
std::vector<Finding> verify_cache(
    const std::filesystem::path& folder,
    bool deep,
    const std::function<void(int64_t done, int64_t total)>& progress = {});

}  // namespace flux::cache
