// Damaged files: refused, or read as if nothing had happened. Never other values, never a crash.
#include <gtest/gtest.h>

#include "common/core/error.h"
#include "common/core/file.h"
#include "formats/cache/journal.h"
#include "formats/cache/reader.h"
#include "formats/cache/segment_reader.h"
#include "tests/support/cache_samples.h"
#include "tests/support/mutants.h"
#include "tests/support/temporary_folder.h"

// HDF5 1.10.8 loses some 400 bytes each time it refuses damaged metadata; for builds with the leak
// sanitizer.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() { return "leak:libhdf5"; }

namespace flux::cache {
namespace {

namespace fs = std::filesystem;
using test::Verdict;

// What `same` says of a file that is read; CacheError refuses it. `share` of the mutants must be
// refused at least: the others hit gaps between HDF5's objects, or white space.
template <class Same>
void expect_refused_or_identical(const fs::path& file, double share, Same same) {
  const auto verdicts = test::judge_mutants(file, [&] {
    try {
      return same() ? Verdict::kIdentical : Verdict::kWrong;
    } catch (const CacheError&) {
      return Verdict::kRefused;
    }
  });
  EXPECT_GT(static_cast<double>(verdicts.refused), share * static_cast<double>(verdicts.all()));
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

void expect_segment_refused_or_identical(const fs::path& file) {
  std::vector<SampleInfo> infos;
  std::vector<std::vector<std::vector<std::byte>>> tensors;
  SegmentHeader header;
  {
    const Segment segment(file);
    header = segment.header();
    infos.assign(segment.samples().begin(), segment.samples().end());
    for (int64_t i = 0; i < segment.num_samples(); ++i) tensors.push_back(segment.read(i));
  }
  expect_refused_or_identical(file, 0.5, [&] {
    const Segment segment(file);
    bool same =
        segment.header() == header &&
        std::equal(infos.begin(), infos.end(), segment.samples().begin(), segment.samples().end());
    for (int64_t i = 0; i < segment.num_samples(); ++i) {
      same = segment.read(i, FrameChecksum::kSkip) == tensors[static_cast<size_t>(i)] && same;
      same = segment.read(i) == tensors[static_cast<size_t>(i)] && same;
    }
    return same;
  });
}

TEST_P(Mutants, OfASegmentAreRefusedOrIdentical) {
  expect_segment_refused_or_identical(only_segment(folder_.path()));
}

TEST(MaskedMutants, OfASegmentAreRefusedOrIdentical) {
  const test::TemporaryFolder folder;
  const Recipe recipe = test::recipe(Kind::kLatents);
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  {
    Writer writer(folder.path(), recipe, test::provenance());
    for (uint64_t i = 0; i < 6; ++i) {
      auto data = test::sample(layout, i);
      if (i != 1) {  // rows of samples without a mask are all ones
        data.info.flags |= kSampleMasked;
        std::vector<float> mask(size_t{data.info.height} * data.info.width);
        for (size_t k = 0; k < mask.size(); ++k) mask[k] = static_cast<float>(k % 65) / 64;
        const auto bytes = std::as_bytes(std::span(mask));
        data.tensors.emplace_back(bytes.begin(), bytes.end());
      }
      writer.add(data.info, data.spans());
    }
    writer.seal();
  }
  expect_segment_refused_or_identical(only_segment(folder.path()));
}

TEST_P(Mutants, OfTheIndexAreRefusedOrIdentical) {
  const fs::path file = folder_.path() / kIndexName;
  const Index index = read_index(file, GetParam());
  expect_refused_or_identical(file, 0.5, [&] { return read_index(file, GetParam()) == index; });
}

TEST_P(Mutants, OfTheManifestAreRefusedOrIdentical) {
  const fs::path file = folder_.path() / kManifestName;
  const Manifest manifest = read_manifest(folder_.path());
  expect_refused_or_identical(file, 0.9, [&] {
    const Manifest found = read_manifest(folder_.path());
    return same_content(found, manifest) && found.provenance == manifest.provenance;
  });
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
  // a journal without its end is no error: what is whole of it counts
  const auto verdicts = test::judge_mutants(file, [&] {
    const std::string bytes = read_file(file);
    const JournalContent found = parse_journal(as_bytes(bytes), file);
    bool same = found.records.size() <= records.size();
    for (size_t i = 0; same && i < found.records.size(); ++i) {
      same =
          found.records[i].info == records[i].info && found.records[i].frames == records[i].frames;
    }
    if (!same) return Verdict::kWrong;
    return found.records.size() == records.size() ? Verdict::kIdentical : Verdict::kRefused;
  });
  EXPECT_GT(static_cast<double>(verdicts.refused), 0.95 * static_cast<double>(verdicts.all()));
}

INSTANTIATE_TEST_SUITE_P(Kinds,
                         Mutants,
                         testing::Values(Kind::kLatents, Kind::kText),
                         [](const auto& tested) { return std::string(kind_name(tested.param)); });

}  // namespace
}  // namespace flux::cache
