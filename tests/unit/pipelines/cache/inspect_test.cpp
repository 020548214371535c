// flux-cache inspect says what a folder holds, whatever became of its writer, and changes nothing.
#include "pipelines/cache/inspect.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/gc.h"
#include "formats/cache/reader.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

Json inspect(const fs::path& folder, bool recover = false) {
  const InspectOptions options{{folder.native()}, true, recover};
  const Contents contents = look_into(folder, recover);
  const std::string text = inspect_text(contents, options);
  EXPECT_THAT(text, testing::HasSubstr(contents.complete ? ", complete" : ", not complete"));
  for (const char c : text) EXPECT_TRUE(c == '\n' || static_cast<unsigned char>(c) >= 32) << text;
  return inspect_json(contents, options);
}

void add_samples(Writer& writer, const Recipe& how, uint64_t begin, uint64_t end) {
  const Layout layout = layout_of(how.kind, how.parameters);
  for (uint64_t i = begin; i < end; ++i)
    writer.add(test::sample(layout, i).info, test::sample(layout, i).spans());
}

// Every name with its bytes and time of modification.
std::map<std::string, std::pair<std::string, fs::file_time_type>> snapshot(const fs::path& folder) {
  std::map<std::string, std::pair<std::string, fs::file_time_type>> out;
  for (const auto& entry : fs::directory_iterator(folder))
    out[entry.path().filename()] = {read_file(entry.path()), fs::last_write_time(entry.path())};
  return out;
}

fs::path first_segment(const fs::path& folder) {
  return folder / read_manifest(folder).segments.at(0).name;
}

class InspectOf : public testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Kinds, InspectOf, testing::Values(Kind::kLatents, Kind::kText));

TEST_P(InspectOf, ListsEverySampleOfACompleteCache) {
  const test::TemporaryFolder folder;
  const Recipe how = test::recipe(GetParam());
  const Layout layout = layout_of(how.kind, how.parameters);
  test::make_cache(folder.path(), how, 0, 140);
  const auto before = snapshot(folder.path());
  const Json found = inspect(folder.path());
  EXPECT_EQ(snapshot(folder.path()), before);
  EXPECT_EQ(found["complete"], true);
  EXPECT_EQ(found["kind"], std::string(kind_name(how.kind)));
  EXPECT_EQ(found["num_samples"], 140);
  EXPECT_EQ(found["num_items"], 140);
  EXPECT_EQ(found["num_unwanted"], 0);
  EXPECT_EQ(found["segments"].size(), 2u);
  EXPECT_EQ(found["parameters"], how.parameters);
  EXPECT_EQ(found["weights"], how.weights);
  EXPECT_EQ(found["provenance"]["tool"], "cache_test");
  EXPECT_TRUE(found["problems"].empty()) << found["problems"];
  ASSERT_EQ(found["samples"].size(), 140u);
  const Cache cache(folder.path(), how.kind);
  for (uint64_t i = 0; i < 140; ++i) {
    const Json& sample = found["samples"][i];
    const auto expected = test::sample(layout, i).info;
    EXPECT_EQ(sample["key"], to_hex(expected.key));
    EXPECT_EQ(
        sample["tensor_xxh3"],
        fmt::format("{:016x}",
                    cache.info(cache.index().variants(static_cast<int64_t>(i))[0]).tensor_xxh3));
    EXPECT_EQ(sample["path"], printable(expected.text));
    if (how.kind == Kind::kLatents)
      EXPECT_EQ(sample["bucket"], bucket_text(expected.height, expected.width));
    else
      EXPECT_EQ(sample["caption"], printable(expected.text));
  }
}

TEST_P(InspectOf, ListsTheSegmentsWithoutAManifest) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(GetParam()), 0, 20);
  fs::remove(folder.path() / kManifestName);
  const Json found = inspect(folder.path());
  EXPECT_EQ(found["complete"], false);
  EXPECT_EQ(found["num_samples"], 20);
  EXPECT_EQ(found["num_items"], Json());
  EXPECT_EQ(found["samples"].size(), 20u);
  EXPECT_EQ(found["parameters"], test::recipe(GetParam()).parameters);
}

TEST_P(InspectOf, CountsWhatAKilledWriterLeftOnlyIfAsked) {
  const test::TemporaryFolder folder;
  const Recipe how = test::recipe(GetParam());
  {
    Writer writer(folder.path(), how, test::provenance());
    add_samples(writer, how, 0, 12);
    writer.seal();
    add_samples(writer, how, 12, 17);
  }  // leaves five in the journal
  for (const auto& entry : fs::directory_iterator(folder.path())) {
    if (entry.path().filename().native().starts_with(".journal-"))
      std::ofstream(entry.path(), std::ios::app) << "torn";
  }
  const auto before = snapshot(folder.path());
  const Json without = inspect(folder.path()), with = inspect(folder.path(), true);
  EXPECT_EQ(snapshot(folder.path()), before);
  EXPECT_EQ(without["num_samples"], 12);
  EXPECT_EQ(without["num_in_journals"], 5);
  EXPECT_EQ(with["num_samples"], 17);
  EXPECT_EQ(with["samples"].size(), 17u);
  ASSERT_EQ(with["journals"].size(), 1u);
  EXPECT_EQ(with["journals"][0]["num_samples"], 5);
  EXPECT_EQ(with["journals"][0]["torn_bytes"], 4);
  EXPECT_EQ(with["complete"], false);
}

TEST(Inspect, ReadsAFolderThatCannotBeWritten) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 3);
  fs::permissions(folder.path(), fs::perms::owner_read | fs::perms::owner_exec);
  const Json found = inspect(folder.path());
  fs::permissions(folder.path(), fs::perms::owner_all);
  EXPECT_EQ(found["num_samples"], 3);
}

TEST(Inspect, TakesNoLockWhileAWriterIsAtWork) {
  const test::TemporaryFolder folder;
  const Recipe how = test::recipe(Kind::kLatents);
  Writer writer(folder.path(), how, test::provenance());
  add_samples(writer, how, 0, 3);
  EXPECT_EQ(inspect(folder.path())["num_samples"], 0);
  EXPECT_EQ(inspect(folder.path(), true)["num_samples"], 3);
  writer.seal();
  EXPECT_EQ(inspect(folder.path())["num_samples"], 3);
  EXPECT_TRUE(fs::exists(folder.path() / ".writer.lock"));
}

TEST(Inspect, NamesADamagedSegmentAndReadsTheOthers) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kLatents), 0, 140);
  const auto bad = first_segment(folder.path());
  const auto lost = read_manifest(folder.path()).segments.at(0).num_samples;
  fs::resize_file(bad, fs::file_size(bad) / 2);
  const Json found = inspect(folder.path());
  EXPECT_EQ(found["complete"], false);
  EXPECT_EQ(found["num_samples"], 140 - lost);
  ASSERT_FALSE(found["problems"].empty());
  EXPECT_THAT(found["problems"][0].get<std::string>(), testing::HasSubstr(bad.filename().native()));
}

TEST(Inspect, NamesASegmentThatIsGone) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 4);
  const auto gone = first_segment(folder.path());
  fs::remove(gone);
  const Json found = inspect(folder.path());
  EXPECT_EQ(found["complete"], false);
  ASSERT_EQ(found["problems"].size(), 1u);
  EXPECT_THAT(found["problems"][0].get<std::string>(),
              testing::AllOf(testing::HasSubstr(gone.filename().native()),
                             testing::HasSubstr("is not there")));
}

TEST(Inspect, CountsWhatNoItemWants) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kLatents), 0, 10);
  test::make_cache(folder.path(), test::recipe(Kind::kLatents), 7, 12);
  const Json found = inspect(folder.path());
  EXPECT_EQ(found["complete"], true);
  EXPECT_EQ(found["num_samples"], 5);
  EXPECT_EQ(found["num_unwanted"], 7);
}

TEST(Inspect, CountsAsUnwantedWhatGcRemoves) {
  const test::TemporaryFolder folder;
  const Recipe how = test::recipe(Kind::kLatents);
  test::make_cache(folder.path(), how, 0, 20);
  std::vector<WantedItem> items;
  {
    Writer writer(folder.path(), how, test::provenance(), {.shard = {1, 3}});
    for (uint64_t i = 0; i < 20; ++i)
      items.push_back(test::wanted(test::sample(layout_of(how.kind, how.parameters), i), i));
    writer.publish(test::publication(items));  // one part of three, over a whole cache
  }
  test::make_cache(folder / "other", how, 15, 20);  // samples that are there a second time
  fs::copy(first_segment(folder / "other"), folder.path());
  const Contents found = look_into(folder.path(), false);
  EXPECT_EQ(inspect(folder.path())["num_samples"], found.manifest->num_samples);
  EXPECT_EQ(found.num_unwanted, 25 - found.manifest->num_samples);
  EXPECT_EQ(collect_garbage(folder.path(), true).removed_samples, found.num_unwanted);
  EXPECT_EQ(collect_garbage(folder.path(), false).removed_samples, found.num_unwanted);
  EXPECT_EQ(inspect(folder.path())["num_unwanted"], 0);
}

TEST(Inspect, TellsInWordsWhatJournalsHold) {
  const test::TemporaryFolder folder;
  const Recipe how = test::recipe(Kind::kText);
  {
    Writer writer(folder.path(), how, test::provenance());
    add_samples(writer, how, 0, 1);
  }
  const auto text = [&](bool recover) {
    InspectOptions options;
    options.recover = recover;
    return inspect_text(look_into(folder.path(), recover), options);
  };
  EXPECT_THAT(
      text(false),
      testing::HasSubstr("samples              0; 1 more in journals (--recover counts them)\n"));
  EXPECT_THAT(text(true), testing::HasSubstr("samples              1, 1 of them in journals\n"));
  EXPECT_THAT(text(true),
              testing::HasSubstr(": 1 sample; the next run of the cache tool seals it"));
}

TEST(Inspect, ShowsProblemsWhereNothingCanBeRead) {
  const test::TemporaryFolder folder;
  folder.write("seg-0123456789abcdef.h5", "damaged");
  EXPECT_THAT(inspect_text(look_into(folder.path(), false), {}),
              testing::HasSubstr("problem              " + folder.path().native() +
                                 "/seg-0123456789abcdef.h5: "));
}

TEST(Inspect, ShowsWhatTheLastRunTook) {
  const test::TemporaryFolder folder;
  const Recipe how = test::recipe(Kind::kText);
  const auto data = test::sample(layout_of(how.kind, how.parameters), 0);
  {
    Writer writer(folder.path(), how, test::provenance());
    writer.add(data.info, data.spans());
    auto publication = test::publication({test::wanted(data, 0)});
    publication.stage_seconds = {{"decode", 1.5}};
    publication.notes = {{"limit", "encode"}, {"images_per_second", 12.25}};
    writer.publish(publication);
  }
  const Json found = inspect(folder.path());
  EXPECT_EQ(found["provenance"]["limit"], "encode");
  EXPECT_EQ(found["provenance"]["images_per_second"], 12.25);
  EXPECT_EQ(found["provenance"]["stage_seconds"]["decode"], 1.5);
  const std::string text = inspect_text(look_into(folder.path(), false), {});
  EXPECT_THAT(text, testing::HasSubstr("limited by           encode\n"));
  EXPECT_THAT(text, testing::HasSubstr("images               12.25 a second\n"));
  EXPECT_THAT(text, testing::HasSubstr("in 1 segment,"));
}

TEST(Inspect, ReadsAManifestWhoseProvenanceIsAnything) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 3);
  Manifest manifest = read_manifest(folder.path());
  manifest.provenance = {{"tool", 7},
                         {"created", nullptr},
                         {"stage_seconds", "long"},
                         {"limit", 1},
                         {"images_per_second", "many"}};
  manifest.plan = {{"subsets", {{{"index", "x"}, {"flip_aug", 3}}, 5}}, {"num_prompts", "\x1b"}};
  folder.write("manifest.json", manifest_text(manifest));
  EXPECT_EQ(inspect(folder.path())["num_samples"], 3);
  EXPECT_THAT(inspect_text(look_into(folder.path(), false), {}), testing::HasSubstr("made by"));
  manifest.plan.erase("num_prompts");
  folder.write("manifest.json", manifest_text(manifest));
  EXPECT_THAT(inspect_text(look_into(folder.path(), false), {}), testing::HasSubstr("subset"));
}

TEST(Inspect, SaysThatAnEmptyFolderHoldsNothing) {
  const test::TemporaryFolder folder;
  const Json found = inspect(folder.path());
  EXPECT_EQ(found["complete"], false);
  EXPECT_EQ(found["num_samples"], 0);
  EXPECT_EQ(found["kind"], Json());
}

TEST(Inspect, RefusesWhatIsNoCache) {
  const test::TemporaryFolder folder;
  EXPECT_THROW(look_into(folder / "absent", false), CacheError);
  EXPECT_THROW(look_into(folder.write("file", "x"), false), CacheError);
  folder.write("pictures/a.png", "x");
  EXPECT_THROW(look_into(folder / "pictures", false), CacheError);
}

TEST(Inspect, NamesASegmentOfTheOtherKind) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "latents", test::recipe(Kind::kLatents), 0, 2);
  test::make_cache(folder / "text", test::recipe(Kind::kText), 0, 2);
  fs::copy(first_segment(folder / "text"), folder / "latents");
  const Json found = inspect(folder / "latents");
  EXPECT_EQ(found["num_samples"], 2);
  ASSERT_EQ(found["problems"].size(), 1u);
  EXPECT_THAT(found["problems"][0].get<std::string>(), testing::HasSubstr("is of kind text"));
}

TEST(Inspect, CountsTokensThatAreCutOff) {
  const test::TemporaryFolder folder;
  test::make_cache(
      folder.path(), test::recipe(Kind::kText), 0, 600);  // T5 loses i tokens of i % 13 + i
  const Json found = inspect(folder.path())["truncation"];
  int64_t captions = 0, used = 0, lost = 0;
  for (int64_t i = 0; i < 600; ++i) {
    const int64_t total = i % (test::kT5Length + 1) + i;
    captions += total > 256, used += std::min<int64_t>(total, 256);
    lost += std::max<int64_t>(total - 256, 0);
  }
  EXPECT_EQ(found["t5_256"]["captions"], captions);
  EXPECT_EQ(found["t5_256"]["tokens_used"], used);
  EXPECT_EQ(found["t5_256"]["tokens_lost"], lost);
  EXPECT_EQ(found["clip_77"]["captions"], 0);
  EXPECT_EQ(found["worst"].size(), 10u);
  EXPECT_GE(found["worst"][0]["t5_tokens"], found["worst"][9]["t5_tokens"]);
}

}  // namespace
}  // namespace flux::cache
