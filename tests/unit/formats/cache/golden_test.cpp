// Caches of every released schema stay readable. tests/golden/cache-v1 was written by the first
// version and is never made again; its README says what is in it.
#include <gtest/gtest.h>

#include "common/core/file.h"
#include "formats/cache/reader.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;

class GoldenCache : public testing::TestWithParam<Kind> {};

TEST_P(GoldenCache, OfSchema1IsRead) {
  const fs::path folder =
      fs::path(FLUX_SOURCE_DIR) / "tests/golden/cache-v1" / kind_name(GetParam());
  const Cache cache(folder, GetParam());
  ASSERT_EQ(cache.index().num_items(), 7);
  EXPECT_EQ(cache.manifest().recipe, test::recipe(GetParam()));
  EXPECT_EQ(cache.manifest().provenance["tool"], "cache_test");
  Xxh3 hash;  // of all tensors: the test's own idea of a sample might change, these bytes must not
  for (int64_t i = 0; i < 7; ++i) {
    SCOPED_TRACE(testing::Message() << "sample " << i);
    const auto expected = test::sample(cache.layout(), static_cast<uint64_t>(i));
    Sample found = cache.read(cache.index().variants(i)[0]);
    EXPECT_EQ(found.tensors, expected.tensors);
    for (const auto& tensor : found.tensors) hash.add(tensor);
    found.info.tensor_xxh3 = 0;
    EXPECT_EQ(found.info, expected.info);
    EXPECT_EQ(cache.index().path(i), expected.info.text);
  }
  EXPECT_EQ(hash.digest(),
            GetParam() == Kind::kLatents ? 10075136226738110773u : 7299429168451913711u);
}

TEST_P(GoldenCache, OfSchema1IsGoneOnWith) {
  const test::TemporaryFolder folder;
  fs::copy(fs::path(FLUX_SOURCE_DIR) / "tests/golden/cache-v1" / kind_name(GetParam()),
           folder.path());
  const std::string manifest = read_file(folder.path() / kManifestName);
  test::make_cache(folder.path(), test::recipe(GetParam()), 0, 7);
  EXPECT_EQ(read_file(folder.path() / kManifestName), manifest)
      << "the same samples were written again";
}

INSTANTIATE_TEST_SUITE_P(Kinds,
                         GoldenCache,
                         testing::Values(Kind::kLatents, Kind::kText),
                         [](const auto& tested) { return std::string(kind_name(tested.param)); });

}  // namespace
}  // namespace flux::cache
