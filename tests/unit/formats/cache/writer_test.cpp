// What a writer puts into a folder, a reader gets back; a second run encodes nothing twice.
#include "formats/cache/writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "common/core/error.h"
#include "common/core/file.h"
#include "formats/cache/reader.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;
using test::SampleData;

int64_t count_files(const fs::path& folder, const std::string& start) {
  int64_t count = 0;
  for (const auto& entry : fs::directory_iterator(folder))
    count += entry.path().filename().native().starts_with(start);
  return count;
}

void expect_samples(const Cache& cache, uint64_t begin, uint64_t end) {
  ASSERT_EQ(cache.index().num_items(), static_cast<int64_t>(end - begin));
  for (uint64_t i = begin; i < end; ++i) {
    SCOPED_TRACE(testing::Message() << "sample " << i);
    const SampleData expected = test::sample(cache.layout(), i);
    const auto row = static_cast<int64_t>(i - begin);
    const auto variants = cache.index().variants(row);
    ASSERT_EQ(variants.size(), 1u);
    EXPECT_EQ(variants[0].key, expected.info.key);
    EXPECT_EQ(variants[0].height, expected.info.height);
    EXPECT_EQ(variants[0].flags, expected.info.flags);
    EXPECT_EQ(cache.index().path(row), expected.info.text);
    EXPECT_EQ(cache.index().item(row).repeats, 1 + i % 3);
    Sample found = cache.read(variants[0]);
    EXPECT_EQ(found.tensors, expected.tensors);
    EXPECT_NE(found.info.tensor_xxh3, 0u);
    found.info.tensor_xxh3 = 0;
    EXPECT_EQ(found.info, expected.info);
  }
}

class WriterOf : public testing::TestWithParam<std::pair<Kind, std::string>> {};

TEST_P(WriterOf, GivesBackEverySample) {
  const auto [kind, dtype] = GetParam();
  const test::TemporaryFolder folder;
  test::make_cache(folder.path() / "cache", test::recipe(kind, dtype), 0, 300);
  const Cache cache(folder.path() / "cache", kind);
  expect_samples(cache, 0, 300);
  EXPECT_EQ(cache.manifest().num_samples, 300);
  EXPECT_EQ(cache.manifest().segments.size(), 3u);  // 128 + 128 + 44
  EXPECT_EQ(count_files(folder.path() / "cache", "."), 0) << "scratch files are left";
}

INSTANTIATE_TEST_SUITE_P(Kinds,
                         WriterOf,
                         testing::Values(std::pair(Kind::kLatents, "bf16"),
                                         std::pair(Kind::kLatents, "f16"),
                                         std::pair(Kind::kLatents, "f32"),
                                         std::pair(Kind::kText, "bf16"),
                                         std::pair(Kind::kText, "f16"),
                                         std::pair(Kind::kText, "f32")));

TEST(Writer, HoldsACacheOfNothing) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kLatents), 0, 0);
  const Cache cache(folder.path(), Kind::kLatents);
  EXPECT_EQ(cache.index().num_items(), 0);
}

TEST(Writer, KeepsTheManifestsTimeWhereNothingChanged) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 5);
  const auto manifest = folder.path() / kManifestName;
  fs::last_write_time(manifest, fs::file_time_type::clock::now() - std::chrono::hours(1));
  const auto before = fs::last_write_time(manifest);
  const auto text = read_file(manifest);
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 5);
  EXPECT_EQ(fs::last_write_time(manifest), before);
  EXPECT_EQ(read_file(manifest), text);
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 6);
  EXPECT_NE(fs::last_write_time(manifest), before);
  expect_samples(Cache(folder.path(), Kind::kText), 0, 6);
}

TEST(Writer, CountsNewChangedKeptAndUnwanted) {
  const test::TemporaryFolder folder;
  const Recipe recipe = test::recipe(Kind::kLatents);
  test::make_cache(folder.path(), recipe, 0, 10);
  const Layout layout = layout_of(recipe.kind, recipe.parameters);

  std::vector<WantedItem> items;
  for (uint64_t i = 0; i < 8; ++i)
    items.push_back(test::wanted(test::sample(layout, i), i));    // 8 and 9: unwanted
  items.push_back(test::wanted(test::sample(layout, 100), 7));    // item 7 once more, new bytes
  items.push_back(test::wanted(test::sample(layout, 101), 101));  // a new item
  items.push_back(test::wanted(test::sample(layout, 3), 102));    // a copy of a kept image
  Recipe other = recipe;
  other.parameters["store"] = "sample";
  const Writer writer(folder.path(), other, test::provenance());
  const Comparison found = writer.compare(items);
  EXPECT_EQ(found.kept, 8);
  EXPECT_EQ(found.new_samples, 1);
  EXPECT_EQ(found.changed, 1);
  EXPECT_EQ(found.unwanted, 2);
  EXPECT_THAT(found.changed_fields,
              testing::ElementsAre("parameters.store: now: \"sample\", before: \"mean_logvar\""));
}

TEST(Writer, LeavesUnwantedSamplesOutOfTheManifest) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kLatents), 0, 10);
  test::make_cache(folder.path(), test::recipe(Kind::kLatents), 20, 23);
  expect_samples(Cache(folder.path(), Kind::kLatents), 20, 23);
  EXPECT_EQ(Cache(folder.path(), Kind::kLatents).manifest().segments.size(), 1u);
  EXPECT_EQ(count_files(folder.path(), "seg-"), 2);
  test::make_cache(
      folder.path(), test::recipe(Kind::kLatents), 0, 10);  // and back, with nothing to encode
  EXPECT_EQ(count_files(folder.path(), "seg-"), 2);
  expect_samples(Cache(folder.path(), Kind::kLatents), 0, 10);
}

TEST(Writer, RecoversWhatWasNotSealed) {
  const test::TemporaryFolder folder;
  const Recipe recipe = test::recipe(Kind::kText);
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  {
    Writer writer(folder.path(), recipe, test::provenance());
    for (uint64_t i = 0; i < 130; ++i)
      writer.add(test::sample(layout, i).info, test::sample(layout, i).spans());
    EXPECT_TRUE(writer.contains(test::sample(layout, 129).info.key));
  }
  EXPECT_EQ(count_files(folder.path(), ".journal-"), 1);
  EXPECT_THROW(Cache(folder.path(), Kind::kText), CacheError);  // no manifest
  Writer writer(folder.path(), recipe, test::provenance());
  EXPECT_EQ(writer.num_recovered(), 2);
  EXPECT_EQ(count_files(folder.path(), ".journal-"), 0);
  EXPECT_TRUE(writer.contains(test::sample(layout, 129).info.key));
}

TEST(Writer, RefusesASecondWriterAndOtherKinds) {
  const test::TemporaryFolder folder;
  {
    const Writer writer(folder.path(), test::recipe(Kind::kText), test::provenance());
    EXPECT_THROW(Writer(folder.path(), test::recipe(Kind::kText), test::provenance()), CacheError);
  }
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 2);
  EXPECT_THROW(Writer(folder.path(), test::recipe(Kind::kLatents), test::provenance()), CacheError);
  EXPECT_THROW(Cache(folder.path(), Kind::kLatents), CacheError);
}

TEST(Writer, WithdrawRemovesTheManifestAndListsTheBadItems) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 2);
  {
    Writer writer(folder.path(), test::recipe(Kind::kText), test::provenance());
    const std::vector<Quarantined> bad = {{sha256("x"), 3, "a\nb.txt", "not UTF-8"}};
    writer.withdraw(bad);
  }
  EXPECT_FALSE(fs::exists(folder.path() / kManifestName));
  EXPECT_THAT(read_file(folder.path() / "quarantine.jsonl"),
              testing::AllOf(testing::HasSubstr("\"reason\":\"not UTF-8\""),
                             testing::HasSubstr("a\\\\nb.txt")));
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 2);
  EXPECT_FALSE(fs::exists(folder.path() / "quarantine.jsonl"));
}

TEST(Writer, RefusesToPublishWhatIsNotThere) {
  const test::TemporaryFolder folder;
  const Recipe recipe = test::recipe(Kind::kText);
  Writer writer(folder.path(), recipe, test::provenance());
  const auto data = test::sample(layout_of(recipe.kind, recipe.parameters), 1);
  EXPECT_THROW(writer.publish(test::publication({test::wanted(data, 1)})), std::invalid_argument);
}

}  // namespace
}  // namespace flux::cache
