// flux-cache diff names every way in which two caches differ, and no other.
#include "pipelines/cache/diff.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/file.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;
using test::SampleData;

Difference diff_of(const fs::path& a, const fs::path& b) {
  return diff(look_into(a, false), look_into(b, false));
}

// A cache of samples 0 to `end` - 1, after `change` had its way with samples and publication.
void make_changed(const fs::path& folder,
                  const Recipe& how,
                  uint64_t end,
                  const std::function<void(std::vector<SampleData>&)>& change_samples,
                  const std::function<void(Publication&)>& change = {},
                  Provenance provenance = test::provenance()) {
  Writer writer(folder, how, provenance);
  std::vector<SampleData> samples;
  std::vector<WantedItem> items;
  for (uint64_t i = 0; i < end; ++i) {
    samples.push_back(test::sample(layout_of(how.kind, how.parameters), i));
    items.push_back(test::wanted(samples.back(), i));
  }
  if (change_samples) change_samples(samples);
  for (const auto& sample : samples) writer.add(sample.info, sample.spans());
  auto publication = test::publication(std::move(items));
  if (change) change(publication);
  writer.publish(publication);
}

TEST(Diff, FindsNoneInACacheMadeElsewhereInAnotherOrder) {
  const test::TemporaryFolder folder;
  for (const Kind kind : {Kind::kLatents, Kind::kText}) {
    const auto a = folder.path() / std::string(kind_name(kind)), b = fs::path(a) += "-2";
    test::make_cache(a, test::recipe(kind), 0, 140);
    make_changed(b,
                 test::recipe(kind),
                 140,
                 [](auto& samples) { std::reverse(samples.begin(), samples.end()); },
                 {},
                 {"other", "9.9", "other --flags", "cuda"});
    const Difference found = diff_of(a, b);
    EXPECT_TRUE(found.equal()) << diff_text(found);
    EXPECT_EQ(found.num_samples_equal, 140);
    EXPECT_EQ(found.num_items_equal, 140);
    EXPECT_EQ(diff_json(found)["equal"], true);
    EXPECT_TRUE(diff_of(a, a).equal());
  }
}

TEST(Diff, NamesFieldsWithBothValues) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "a", test::recipe(Kind::kText), 0, 3);
  Recipe other = test::recipe(Kind::kText);
  other.parameters["pad_policy"] = "masked";
  other.weights["t5"] = std::string(64, 'c');
  other.tokenizers["clip"] = std::string(64, 'd');
  make_changed(
      folder / "b", other, 3, {}, [](Publication& p) { p.plan["subsets"][0]["index"] = 1; });
  const Difference found = diff_of(folder / "a", folder / "b");
  EXPECT_FALSE(found.equal());
  using testing::HasSubstr;
  EXPECT_THAT(
      found.fields,
      testing::UnorderedElementsAre(
          testing::AllOf(
              HasSubstr("parameters.pad_policy: "), HasSubstr("nothing"), HasSubstr("masked")),
          testing::AllOf(HasSubstr("weights.t5: "), HasSubstr("aaaa"), HasSubstr("cccc")),
          testing::AllOf(HasSubstr("tokenizers.clip: "), HasSubstr("aaaa"), HasSubstr("dddd")),
          testing::AllOf(
              HasSubstr("plan.subsets.0.index: "), HasSubstr("a: 0"), HasSubstr("b: 1"))));
  EXPECT_EQ(found.num_samples_equal, 3);
  EXPECT_EQ(found.num_items_equal, 3);
}

TEST(Diff, CountsSamplesAndItemsThatOneHas) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "a", test::recipe(Kind::kLatents), 0, 20);
  test::make_cache(folder / "b", test::recipe(Kind::kLatents), 8, 21);
  const Difference found = diff_of(folder / "a", folder / "b");
  EXPECT_EQ(found.samples_only_a.count, 8);
  EXPECT_EQ(found.samples_only_a.examples.size(), 5u);
  EXPECT_EQ(found.samples_only_b.count, 1);
  EXPECT_EQ(
      found.samples_only_b.examples.at(0).id,
      to_hex(test::sample(layout_of(Kind::kLatents, test::recipe(Kind::kLatents).parameters), 20)
                 .info.key));
  EXPECT_EQ(found.items_only_a.count, 8);
  EXPECT_EQ(found.items_only_b.count, 1);
  EXPECT_EQ(found.num_samples_equal, 12);
  EXPECT_EQ(found.samples_changed.count + found.items_changed.count, 0);
  const auto json = diff_json(found);
  EXPECT_EQ(json["equal"], false);
  EXPECT_EQ(json["samples"]["only_a"]["count"], 8);
  for (const char c : diff_text(found))
    EXPECT_TRUE(c == '\n' || static_cast<unsigned char>(c) >= 32);
}

TEST(Diff, MeasuresHowFarValuesAreApart) {
  for (const auto& [kind, dtype] :
       {std::pair(Kind::kLatents, "f32"), {Kind::kText, "bf16"}, {Kind::kLatents, "f16"}}) {
    SCOPED_TRACE(dtype);
    const test::TemporaryFolder folder;
    const std::string type = dtype;
    const auto put = [&](SampleData& sample, uint32_t bits) {
      std::memcpy(sample.tensors.back().data(), &bits, type == "f32" ? 4 : 2);
    };
    const auto in_type = [&](uint32_t f32, uint32_t f16, uint32_t bf16) {
      return type == "f32" ? f32 : type == "f16" ? f16 : bf16;
    };
    const uint32_t one = in_type(0x3F800000, 0x3C00, 0x3F80);
    const uint32_t three_and_a_half = in_type(0x40600000, 0x4300, 0x4060);
    const uint32_t infinite = in_type(0x7F800000, 0x7C00, 0x7F80);
    make_changed(folder / "a", test::recipe(kind, dtype), 6, [&](auto& s) {
      put(s[2], one), put(s[4], one);
    });
    make_changed(folder / "b", test::recipe(kind, dtype), 6, [&](auto& s) {
      put(s[2], three_and_a_half), put(s[4], infinite);
    });
    const Difference found = diff_of(folder / "a", folder / "b");
    EXPECT_EQ(found.samples_changed.count, 2);
    EXPECT_EQ(found.max_abs_difference, 2.5);
    EXPECT_EQ(found.num_not_finite, 1);
    EXPECT_EQ(found.num_samples_equal, 4);
    EXPECT_EQ(found.num_items_equal, 6);  // the keys are the same
  }
}

TEST(Diff, NamesItemsWhoseWeightsOrRepeatsDiffer) {
  const test::TemporaryFolder folder;
  const Recipe how = test::recipe(Kind::kText);
  const auto with = [](double weight, uint32_t repeats) {
    return [=](Publication& p) {
      p.items[1].variants.push_back(p.items[2].variants[0]);
      p.items[1].variants[0].weight = weight, p.items[1].variants[1].weight = 1 - weight;
      p.items[3].repeats = repeats;
    };
  };
  make_changed(folder / "a", how, 5, {}, with(0.5, 4));
  make_changed(folder / "b", how, 5, {}, with(0.25, 4));
  make_changed(folder / "c", how, 5, {}, with(0.25, 9));
  const auto of = [](uint64_t i) { return to_hex(sha256("item " + std::to_string(i))); };
  const Difference weights = diff_of(folder / "a", folder / "b");
  EXPECT_FALSE(weights.equal());
  ASSERT_EQ(weights.items_changed.count, 1);
  EXPECT_EQ(weights.items_changed.examples[0].id, of(1));
  const Difference repeats = diff_of(folder / "b", folder / "c");
  ASSERT_EQ(repeats.items_changed.count, 1);
  EXPECT_EQ(repeats.items_changed.examples[0].id, of(3));
  EXPECT_TRUE(repeats.fields.empty());
}

TEST(Diff, TellsKindsAndUnfinishedCachesApart) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "a", test::recipe(Kind::kText), 0, 3);
  test::make_cache(folder / "b", test::recipe(Kind::kText), 0, 3);
  test::make_cache(folder / "c", test::recipe(Kind::kLatents), 0, 3);
  fs::remove(folder / "b" / kManifestName);
  EXPECT_THAT(diff_of(folder / "a", folder / "b").fields,
              testing::ElementsAre(testing::HasSubstr("complete: ")));
  EXPECT_THAT(diff_of(folder / "a", folder / "c").fields,
              testing::Contains(testing::HasSubstr("kind: ")));
}

TEST(Diff, RefusesWhatItCannotRead) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "a", test::recipe(Kind::kText), 0, 3);
  fs::create_directory(folder / "empty");
  EXPECT_THROW(diff_of(folder / "a", folder / "empty"), CacheError);
  EXPECT_THROW(diff_of(folder / "absent", folder / "a"), CacheError);
  fs::copy(folder / "a", folder / "damaged");
  const auto segment = folder / "damaged" / read_manifest(folder / "a").segments.at(0).name;
  fs::resize_file(segment, fs::file_size(segment) - 1);
  EXPECT_THROW(diff_of(folder / "a", folder / "damaged"), CacheError);
}

}  // namespace
}  // namespace flux::cache
