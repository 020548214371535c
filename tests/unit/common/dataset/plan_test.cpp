#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/dataset/dataset.h"
#include "tests/support/temporary_folder.h"

namespace flux::dataset {
namespace {

Resolved two_folders(const test::TemporaryFolder& folder, const std::string& general) {
  for (const char* name : {"a/1.png", "a/2.png", "a/3.png", "b/r.png", "b/s.png"})
    folder.write(name, "x");
  return resolve_file(
      folder.write("set.toml",
                   "[general]\n" + general +
                       "\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nnum_repeats = 3\n"
                       "[[datasets.subsets]]\nimage_dir = 'b'\nis_reg = true\n"),
      Profile::kDefault,
      {},
      folder.path());
}

TEST(Plan, RepeatsRegularisationImagesToTheNumberOfTheOthers) {
  const test::TemporaryFolder folder;
  const auto r = two_folders(folder, "resolution = 64");
  ASSERT_EQ(r.images.size(), 5u);
  EXPECT_EQ(r.images[3].repeats, 5);
  EXPECT_EQ(r.images[4].repeats, 4);
  EXPECT_EQ(regularisation_repeats({2, 2, 2}, 3),
            (std::vector<int64_t>{2, 2, 0}));  // surplus ones are not visited
  EXPECT_EQ(regularisation_repeats({1, 1, 1, 1}, 21), (std::vector<int64_t>{6, 5, 5, 5}));
  EXPECT_EQ(regularisation_repeats({}, 21), std::vector<int64_t>{});
}

TEST(Plan, DigestCoversRepeatsButNoResolutionOrPlace) {
  const test::TemporaryFolder folder, elsewhere;
  const auto digest = [](const Resolved& r) { return plan_digest(plan_json(r)); };
  const auto base = digest(two_folders(folder, "resolution = 64"));
  EXPECT_EQ(base,
            digest(two_folders(elsewhere,
                               "resolution = 128\nenable_bucket = true\nmin_bucket_reso = 64")));
  EXPECT_EQ(
      base,
      digest(two_folders(folder, "resolution = 64\nshuffle_caption = true\ncaption_prefix = 'p'")));
  EXPECT_NE(base, digest(two_folders(folder, "resolution = 64\ncaption_dropout_rate = 0.1")));
  EXPECT_NE(base, digest(two_folders(folder, "resolution = 64\nflip_aug = true")));
  EXPECT_NE(base, digest(two_folders(folder, "resolution = 64\nbatch_size = 2")));
}

TEST(Plan, ReadsBackWhatItWrites) {
  const test::TemporaryFolder folder;
  const auto json = plan_json(
      two_folders(folder, "resolution = 64\nvalidation_split = 0.5\ncaption_dropout_rate = 0.25"));
  const auto plan = parse_plan(nlohmann::json::parse(json.dump()));
  ASSERT_EQ(plan.subsets.size(), 2u);
  EXPECT_EQ(plan.subsets[0].num_repeats, 3);
  EXPECT_TRUE(plan.subsets[1].is_reg);
  EXPECT_EQ(plan.subsets[0].caption_dropout_rate, 0.25);
  EXPECT_EQ(plan.datasets[0].validation_split, 0.5);
  auto odd = json;
  odd["subsets"][0]["surprise"] = 1;
  EXPECT_THROW(parse_plan(odd), CacheError);
  EXPECT_THROW(parse_plan(nlohmann::json::array()), CacheError);
  odd = json;
  odd["subsets"][0]["is_reg"] = 1;
  EXPECT_THROW(parse_plan(odd), CacheError);
}

TEST(Plan, HoldsOutByHashWhateverTheOrder) {
  std::vector<Sha256Digest> items;
  for (int i = 0; i < 33; ++i) items.push_back(item_digest(0, std::to_string(i)));
  const auto members = validation_members(items, 0.2, 7);
  EXPECT_EQ(std::count(members.begin(), members.end(), true), 6);
  auto reversed = items;
  std::reverse(reversed.begin(), reversed.end());
  auto members_reversed = validation_members(reversed, 0.2, 7);
  std::reverse(members_reversed.begin(), members_reversed.end());
  EXPECT_EQ(members, members_reversed);
  EXPECT_NE(members, validation_members(items, 0.2, 8));
  EXPECT_EQ(validation_members(items, 0, 7), std::vector<bool>(33, false));
  EXPECT_EQ(validation_members(items, 1, 7), std::vector<bool>(33, true));
}

TEST(Plan, ItemsDependOnSubsetAndName) {
  EXPECT_EQ(to_hex(item_digest(0, "a.png")), to_hex(sha256(std::string(8, '\0') + "a.png")));
  EXPECT_NE(item_digest(0, "a.png"), item_digest(1, "a.png"));
}

}  // namespace
}  // namespace flux::dataset
