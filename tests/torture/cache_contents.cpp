// cache_contents DIR: reads everything a cache folder holds, whole, and changes nothing. A line each:
//
//   published SEGMENT KEY XXH3    a sample of a segment, decoded and verified
//   journal JOURNAL KEY XXH3      a whole sample of a journal, likewise
//   wanted KEY XXH3               a variant of the index, read through the manifest
//   complete ITEMS                there is a manifest, and all it says is so
//   bad FILE: WHY                 a file under a published name that cannot be read whole
//
// Exit 1 if anything is bad. A folder that is not there is empty.
#include <cstdio>
#include <exception>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "common/core/file.h"
#include "formats/cache/journal.h"
#include "formats/cache/reader.h"
#include "formats/cache/segment_reader.h"
#include "formats/cache/segment_writer.h"
#include "tests/support/temporary_folder.h"

namespace {

namespace fs = std::filesystem;
using namespace flux;

int result = 0;

void bad(const std::string& name, const std::exception& error) {
  std::printf("bad %s: %s\n", name.c_str(), error.what());
  result = 1;
}

void print(const char* what, const std::string& name, const cache::SampleInfo& info) {
  std::printf("%s %s %s %016llx\n",
              what,
              name.c_str(),
              to_hex(info.key).c_str(),
              static_cast<unsigned long long>(info.tensor_xxh3));
}

void read_segment(const char* what, const fs::path& path, const std::string& name) {
  const cache::Segment segment(path);
  for (int64_t i = 0; i < segment.num_samples(); ++i) {
    (void)segment.read(i);  // verifies the frame's checksum and tensor_xxh3
    print(what, name, segment.samples()[static_cast<size_t>(i)]);
  }
}

void read_journal(const fs::path& path, const std::string& name) {
  const MappedFile file(path);
  const auto content = cache::parse_journal(file.bytes(), path);
  const std::span<const cache::Record> records = content.records;
  const test::TemporaryFolder folder;
  for (size_t begin = 0; begin < records.size(); begin += cache::kMaxSegmentSamples) {
    const auto part =
        records.subspan(begin, std::min<size_t>(records.size() - begin, cache::kMaxSegmentSamples));
    const auto bytes = cache::encode_segment(content.header, part);
    read_segment(
        "journal",
        folder.write("segment.h5", {reinterpret_cast<const char*>(bytes.data()), bytes.size()}),
        name);
  }
}

void read_cache(const fs::path& folder) {
  const auto kind = cache::read_manifest(folder).recipe.kind;
  const cache::Cache cache(folder, kind);
  for (const auto& variant : cache.index().variants()) {
    const auto sample = cache.read(variant);
    std::printf("wanted %s %016llx\n",
                to_hex(variant.key).c_str(),
                static_cast<unsigned long long>(sample.info.tensor_xxh3));
  }
  std::printf("complete %lld\n", static_cast<long long>(cache.manifest().num_items));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const fs::path folder = argv[1];
  if (!fs::exists(folder)) return 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().native();
    try {
      if (cache::is_segment_name(name)) read_segment("published", entry.path(), name);
      if (cache::is_journal_name(name)) read_journal(entry.path(), name);
    } catch (const std::exception& error) {
      bad(name, error);
    }
  }
  try {
    if (fs::exists(folder / cache::kManifestName)) read_cache(folder);
  } catch (const std::exception& error) {
    bad(cache::kManifestName, error);
  }
  return result;
}
