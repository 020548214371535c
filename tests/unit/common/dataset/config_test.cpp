#include <gtest/gtest.h>

#include <string>

#include "common/core/error.h"
#include "common/dataset/dataset.h"
#include "tests/support/temporary_folder.h"

namespace flux::dataset {
namespace {

class DatasetFile : public testing::Test {
 protected:
  DatasetFile() {
    for (const char* name :
         {"cats/a.png", "cats/b.JPG", "cats/c.txt", "style/s.webp", "reg/r0.png", "reg/r1.png"}) {
      folder.write(name, "x");
    }
  }
  Resolved resolve(const std::string& toml,
                   Profile profile = Profile::kDefault,
                   const std::vector<Fallback>& fallbacks = {}) {
    return resolve_file(folder.write("set.toml", toml), profile, fallbacks, folder.path());
  }
  std::string error_of(const std::string& toml) {
    try {
      refuse_uncacheable(resolve(toml));
    } catch (const InputError& error) {
      return error.what();
    }
    return "accepted";
  }
  test::TemporaryFolder folder;
};

const std::string kCats =
    "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'cats'\n";

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST_F(DatasetFile, TakesTheInnermostValue) {
  const auto r = resolve(
      "[general]\nnum_repeats = 2\nshuffle_caption = true\nresolution = [96, 64]\n"
      "[[datasets]]\nnum_repeats = 3\nbatch_size = 4\n"
      "[[datasets.subsets]]\nimage_dir = 'cats'\n"
      "[[datasets.subsets]]\nimage_dir = 'style'\nnum_repeats = 5\nshuffle_caption = false\n",
      Profile::kDefault,
      {{"num_repeats", "9"}, {"keep_tokens", "1"}, {"resolution", "32"}});
  ASSERT_EQ(r.subsets.size(), 2u);
  EXPECT_EQ(r.datasets[0].batch_size, 4);
  EXPECT_EQ(r.subsets[0].num_repeats, 3);
  EXPECT_EQ(r.subsets[1].num_repeats, 5);
  EXPECT_EQ(r.subsets[0].captions.keep_tokens, 1);
  EXPECT_TRUE(r.subsets[0].captions.shuffle);
  EXPECT_FALSE(r.subsets[1].captions.shuffle);
  EXPECT_EQ(r.subsets[0].pixels.width, 96);
  EXPECT_EQ(r.unused_fallbacks, (std::vector<std::string>{"num_repeats", "resolution"}));
  ASSERT_EQ(r.images.size(), 3u);
  EXPECT_EQ(r.images[0].name, "a.png");
  EXPECT_EQ(r.images[2].repeats, 5);
}

TEST_F(DatasetFile, NamesTheUnknownKeyAndTheNearest) {
  const auto error = error_of(
      "[[datasets]]\nresolution = 64\nbukcet_reso_steps = 16\n[[datasets.subsets]]\nimage_dir = "
      "'cats'\n");
  EXPECT_HAS(error, "set.toml: [[datasets]] 1: unknown key bukcet_reso_steps");
  EXPECT_HAS(error, "did you mean bucket_reso_steps?");
  EXPECT_HAS(error_of("[genral]\n" + kCats), "did you mean general?");
}

TEST_F(DatasetFile, RefusesWrongTypesAndRanges) {
  EXPECT_HAS(error_of("[general]\nenable_bucket = 1\n" + kCats),
             "key enable_bucket: must be true or false");
  EXPECT_HAS(error_of("[general]\nbatch_size = '2'\n" + kCats),
             "key batch_size: must be a whole number");
  EXPECT_HAS(error_of("[general]\nbatch_size = 0\n" + kCats), "0 is out of range");
  EXPECT_HAS(error_of("[general]\nvalidation_split = 1\n" + kCats),
             "must be a number with a decimal point");
  EXPECT_HAS(error_of("[general]\ncaption_dropout_rate = nan\n" + kCats), "out of range");
  EXPECT_HAS(error_of("[general]\nresolution = [1, 2, 3]\n" + kCats),
             "must be a whole number or [width, height]");
  EXPECT_HAS(error_of("[general]\nis_reg = true\n" + kCats), "key is_reg cannot stand here");
  EXPECT_HAS(error_of(kCats + "image_dir = 'cats'\n"), "set.toml: line ");
  EXPECT_HAS(error_of(std::string(100000, '[')), "nested too deeply");
  EXPECT_HAS(error_of("a" + std::string(1000, '.') + "\n"), "nested too deeply");
  EXPECT_HAS(error_of(""), "[[datasets]] is required");
  EXPECT_HAS(error_of("x = '\xFF'"), "not UTF-8 at byte 5");
}

TEST_F(DatasetFile, RefusesContradictions) {
  const std::string buckets =
      "[general]\nenable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = "
      "32\nmax_bucket_reso = ";
  EXPECT_HAS(error_of(buckets + "32\n" + kCats),
             "max_bucket_reso 32 is below the resolution 64x64");
  EXPECT_HAS(error_of(kCats + "[[datasets.subsets]]\nimage_dir = 'cats'\n"), "the same");
  EXPECT_HAS(error_of(kCats + "[[datasets.subsets]]\nmetadata_file = 'm.json'\n"),
             "cannot be mixed");
  EXPECT_HAS(error_of("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cats'\n"),
             "resolution is required");
  EXPECT_HAS(
      error_of("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'nowhere'\n"),
      "no such folder");
}

TEST_F(DatasetFile, RefusesByNameWhatACacheCannotHonour) {
  for (const char* option : {"color_aug = true",
                             "random_crop = true",
                             "face_crop_aug_range = [1.0, 2.0]",
                             "token_warmup_step = 5",
                             "custom_attributes = {a = 1}"}) {
    const std::string text = option;
    EXPECT_HAS(error_of(kCats + text + "\n"), "option " + text.substr(0, text.find(' ')));
  }
  EXPECT_HAS(error_of("[general]\nnetwork_multiplier = 0.5\n" + kCats), "network_multiplier");
  EXPECT_HAS(
      error_of("[general]\nenable_bucket = true\nmin_bucket_reso = 64\nbucket_reso_steps = 8\n" +
               kCats),
      "multiple of 16");
  EXPECT_HAS(error_of(kCats + "conditioning_data_dir = 'x'\n"), "not supported");
  EXPECT_EQ(error_of(kCats + "cache_info = true\ncustom_attributes = {}\n"), "accepted");
}

TEST_F(DatasetFile, ListsByExtensionOfTheProfile) {
  for (const char* name : {"cats/d.Png", "cats/e.GIF", "cats/.hidden.png", "cats/f.png/inside.png"})
    folder.write(name, "x");
  EXPECT_EQ(resolve(kCats).images.size(), 4u);
  EXPECT_EQ(resolve(kCats, Profile::kKohya).images.size(), 2u);
}

TEST_F(DatasetFile, ReadsMetadata) {
  const std::string toml =
      "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = 'm.jsonl'\nimage_dir = "
      "'cats'\n";
  folder.write("m.jsonl",
               "{\"image_path\": \"b.JPG\", \"caption\": \"x\", \"tags\": \"t, "
               "u\"}\n\n{\"image_path\": \"a.png\", \"tags\": \"t\"}\n");
  const auto r = resolve(toml);
  ASSERT_EQ(r.images.size(), 2u);
  EXPECT_EQ(read_caption(r, r.images[0]), "t");
  EXPECT_EQ(read_caption(r, r.images[1]), "x,t, u");
  EXPECT_EQ(r.images[1].file, folder / "cats/b.JPG");
  folder.write("m.jsonl", "{\"image_path\": 5}");
  EXPECT_HAS(error_of(toml), "m.jsonl: line 1: image_path must be text");
  folder.write("m.jsonl", "{\"image_path\": \"a\"}\n{\"image_path\": \"a\"}");
  EXPECT_HAS(error_of(toml), "named twice");
  folder.write("m.jsonl", "{");
  EXPECT_HAS(error_of(toml), "m.jsonl: line 1: not JSON");
}

TEST_F(DatasetFile, FindsCaptions) {
  folder.write("cats/a.caption", "from a file\nsecond");
  folder.write("cats/x_1_2_3_4.png", "x");
  folder.write("cats/x.caption", "of the whole picture");
  const auto r = resolve(kCats + "class_tokens = 'cat'\n");
  EXPECT_EQ(read_caption(r, r.images[0]), "from a file");
  EXPECT_EQ(read_caption(r, r.images[1]), "cat");
  EXPECT_EQ(read_caption(r, r.images[2]), "of the whole picture");
  const auto without = resolve(kCats);
  EXPECT_EQ(read_caption(without, without.images[1]), std::nullopt);
}

TEST_F(DatasetFile, FolderAloneTakesTxtThenCaption) {
  folder.write("cats/a.txt", "txt"), folder.write("cats/a.caption", "caption"),
      folder.write("cats/b.caption", "caption");
  const auto r = resolve_folder(folder / "cats", 512, 768, Profile::kDefault);
  ASSERT_EQ(r.images.size(), 2u);
  EXPECT_EQ(read_caption(r, r.images[0]), "txt");
  EXPECT_EQ(read_caption(r, r.images[1]), "caption");
  const auto& p = r.subsets[0].pixels;
  EXPECT_TRUE(p.buckets);
  EXPECT_EQ(p.min_side, 32);
  EXPECT_EQ(p.max_side, 3072);
  EXPECT_EQ(p.steps, 16);
  EXPECT_NO_THROW(refuse_uncacheable(r));
  folder.write("empty/readme.md", "x");
  EXPECT_THROW(resolve_folder(folder / "empty", 512, 512, Profile::kDefault), InputError);
  EXPECT_THROW(resolve_folder(folder / "nowhere", 512, 512, Profile::kDefault), InputError);
}

TEST_F(DatasetFile, OddFileNamesAreItemsLikeOthers) {
  folder.write("odd/a b\n.png", "x"), folder.write("odd/\xFF\xFE.png", "x"),
      folder.write("odd/\xFF\xFE.txt", "caption");
  const auto r = resolve_folder(folder / "odd", 512, 512, Profile::kDefault);
  ASSERT_EQ(r.images.size(), 2u);
  EXPECT_EQ(r.images[0].name, "a b\n.png");
  EXPECT_EQ(r.images[1].name, "\xFF\xFE.png");
  EXPECT_EQ(read_caption(r, r.images[1]), "caption");
}

}  // namespace
}  // namespace flux::dataset
