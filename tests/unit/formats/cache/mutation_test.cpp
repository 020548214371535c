// Damaged files: refused, or read as if nothing had happened. Never other values, never a crash.
#include <gtest/gtest.h>

#include <fstream>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/rng.h"
#include "formats/cache/journal.h"
#include "formats/cache/reader.h"
#include "formats/cache/segment_reader.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"

// HDF5 1.10.8 loses some 400 bytes each time it refuses damaged metadata; for builds with the leak
// sanitizer.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() { return "leak:libhdf5"; }

namespace flux::cache {
namespace {

namespace fs = std::filesystem;
constexpr uint64_t kMutants = 1000;

// Mutant number `i`: a bit flipped, bytes overwritten, zeroed or cut off.
std::string mutant(std::string bytes, uint64_t i) {
  const RandomStream random(11, Purpose::kShuffle, i);
  const auto place = static_cast<size_t>(random.below(0, bytes.size()));
  const auto length = std::min<size_t>(bytes.size() - place, 1 + random.below(1, 64));
  switch (i % 8) {
    default:
      bytes[place] = static_cast<char>(bytes[place] ^ (1 << random.below(2, 8)));
      break;
    case 5:
      for (size_t k = 0; k < length; ++k) bytes[place + k] = static_cast<char>(random.bits(3 + k));
      break;
    case 6:
      for (size_t k = 0; k < length; ++k) bytes[place + k] = 0;
      break;
    case 7:
      bytes.resize(place);
      break;
  }
  return bytes;
}

// Writing over a file would flush it to the disk on some file systems, a thousand times.
void write_anew(const fs::path& file, const std::string& bytes) {
  fs::remove(file);
  std::ofstream(file, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

struct Outcome {
  int64_t refused = 0, identical = 0;
};

// Calls `read` for each mutant of `file`, written in its place; `read` returns whether the content
// is the original's.
template <class Read>
Outcome try_mutants(const fs::path& file, Read read) {
  const std::string good = read_file(file);
  Outcome outcome;
  for (uint64_t i = 0; i < kMutants; ++i) {
    write_anew(file, mutant(good, i));
    try {
      EXPECT_TRUE(read()) << "mutant " << i << " reads as something else";
      ++outcome.identical;
    } catch (const CacheError&) {
      ++outcome.refused;
    }
  }
  write_anew(file, good);
  EXPECT_TRUE(read());
  return outcome;
}

fs::path only_segment(const fs::path& folder) {
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (is_segment_name(entry.path().filename().native())) return entry.path();
  }
  return {};
}

class Mutants : public testing::TestWithParam<Kind> {
 protected:
  void SetUp() override { test::make_cache(folder_.path(), test::recipe(GetParam()), 0, 9); }
  test::TemporaryFolder folder_;
};

TEST_P(Mutants, OfASegmentAreRefusedOrIdentical) {
  const fs::path file = only_segment(folder_.path());
  std::vector<SampleInfo> infos;
  std::vector<std::vector<std::vector<std::byte>>> tensors;
  SegmentHeader header;
  {
    const Segment segment(file);
    header = segment.header();
    infos.assign(segment.samples().begin(), segment.samples().end());
    for (int64_t i = 0; i < segment.num_samples(); ++i) tensors.push_back(segment.read(i));
  }
  const Outcome outcome = try_mutants(file, [&] {
    const Segment segment(file);
    bool same =
        segment.header() == header &&
        std::equal(infos.begin(), infos.end(), segment.samples().begin(), segment.samples().end());
    for (int64_t i = 0; i < segment.num_samples(); ++i)
      same = segment.read(i) == tensors[static_cast<size_t>(i)] && same;
    return same;
  });
  EXPECT_GT(outcome.refused, 500);  // the others hit gaps between HDF5's objects
}

TEST_P(Mutants, OfTheIndexAreRefusedOrIdentical) {
  const fs::path file = folder_.path() / kIndexName;
  const Index index = read_index(file, GetParam());
  const Outcome outcome = try_mutants(file, [&] { return read_index(file, GetParam()) == index; });
  EXPECT_GT(outcome.refused, 500);
}

TEST_P(Mutants, OfTheManifestAreRefusedOrIdentical) {
  const fs::path file = folder_.path() / kManifestName;
  const Manifest manifest = read_manifest(folder_.path());
  const Outcome outcome = try_mutants(file, [&] {
    const Manifest found = read_manifest(folder_.path());
    return same_content(found, manifest) && found.provenance == manifest.provenance;
  });
  EXPECT_GT(outcome.refused, 900);  // white space may change
}

TEST_P(Mutants, OfAJournalGiveAPrefixOfItsSamples) {
  const test::TemporaryFolder other;
  const Recipe recipe = test::recipe(GetParam());
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  std::vector<Record> records;
  {
    Journal journal(other.path(), {recipe, test::provenance(), "now"});
    for (uint64_t i = 0; i < 6; ++i) {
      const auto data = test::sample(layout, i);
      records.push_back(prepare(layout, data.info, data.spans()));
      journal.append(records.back());
    }
  }
  const fs::path file = fs::directory_iterator(other.path())->path();
  int64_t cut = 0;
  try_mutants(file, [&] {
    const std::string bytes = read_file(file);
    const JournalContent found = parse_journal(as_bytes(bytes), file);
    bool same = found.records.size() <= records.size();
    for (size_t i = 0; same && i < found.records.size(); ++i) {
      same =
          found.records[i].info == records[i].info && found.records[i].frames == records[i].frames;
    }
    cut += found.records.size() < records.size();
    return same;
  });
  EXPECT_GT(cut, 950);
}

INSTANTIATE_TEST_SUITE_P(Kinds,
                         Mutants,
                         testing::Values(Kind::kLatents, Kind::kText),
                         [](const auto& tested) { return std::string(kind_name(tested.param)); });

}  // namespace
}  // namespace flux::cache
