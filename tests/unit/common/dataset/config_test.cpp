#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "common/core/error.h"
#include "common/core/log.h"
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
      EXPECT_NE(std::string_view(error.what()).find("\n  hint: "), std::string_view::npos)
          << error.what();
      return error.what();
    }
    return "accepted";
  }
  /// The warnings of reading a file, and the number of images.
  std::string warnings_of(const std::string& toml, Profile profile = Profile::kDefault) {
    testing::internal::CaptureStderr();
    try {
      num_images = resolve(toml, profile).images.size();
    } catch (const InputError& error) {
      log::warn("refused: {}", error.what());
    }
    return testing::internal::GetCapturedStderr();
  }
  test::TemporaryFolder folder;
  size_t num_images = 0;
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
  EXPECT_HAS(error_of(kCats + "conditioning_data_dir = 'x'\nalpha_mask = true\n"),
             "conditioning_data_dir and alpha_mask contradict each other");
  EXPECT_HAS(error_of("[general]\nconditioning_data_dir = 'x'\n" + kCats), "cannot stand here");
  EXPECT_EQ(error_of(kCats + "conditioning_data_dir = 'x'\n"), "accepted");
  EXPECT_EQ(error_of(kCats + "cache_info = true\ncustom_attributes = {}\n"), "accepted");
}

TEST_F(DatasetFile, HoldsOutAPictureAtAllItsResolutions) {
  for (int i = 0; i < 20; ++i) folder.write(fmt::format("cats/{}.png", i), "x");
  const Resolved r = resolve(
      "[general]\nvalidation_split = 0.25\n"
      "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'cats'\n"
      "[[datasets]]\nresolution = 96\n[[datasets.subsets]]\nimage_dir = 'cats'\n");
  std::map<int64_t, std::vector<std::string>> held_out;
  for (const Image& image : r.images)
    if (image.validation) held_out[image.subset].push_back(image.name);
  EXPECT_EQ(held_out[0].size(), 5u);
  EXPECT_EQ(held_out[0], held_out[1]);
}

TEST_F(DatasetFile, MasksAreThePicturesOfTheSameNames) {
  folder.write("cats/two.png", "x");
  folder.write("cats/none.png", "x");
  for (const char* name :
       {"masks/a.webp", "masks/b.jpg", "masks/two.png", "masks/two.bmp", "masks/z.png"})
    folder.write(name, "x");
  const auto masks_of = [&](const std::string& toml) {
    const Resolved resolved = resolve(toml);
    const auto found = find_masks(resolved);
    EXPECT_EQ(found.size(), resolved.images.size());
    std::map<std::string, std::string> out;
    for (size_t i = 0; i < found.size(); ++i)
      out[resolved.images[i].name] = found[i].file.empty()
                                         ? found[i].reason
                                         : found[i].file.lexically_relative(folder.path()).native();
    return out;
  };
  testing::internal::CaptureStderr();
  auto found = masks_of(kCats + "conditioning_data_dir = 'masks'\n");
  EXPECT_HAS(testing::internal::GetCapturedStderr(), "a mask of no image: z.png");
  EXPECT_EQ(found["a.png"], "masks/a.webp");
  EXPECT_EQ(found["b.JPG"], "masks/b.jpg");
  EXPECT_HAS(found["two.png"], "two masks: two.bmp and two.png in ");
  EXPECT_HAS(found["none.png"], "no mask: ");
  found = masks_of(kCats);
  EXPECT_EQ(found["a.png"], "");

  folder.write("m.json", R"({"cats/a.png": {"caption": "x"}, "style/s.webp": {"caption": "y"}})");
  folder.write("masks/cats/a.png", "x");
  found = masks_of(
      "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = 'm.json'\n"
      "image_dir = '.'\nconditioning_data_dir = 'masks'\n");
  EXPECT_EQ(found["cats/a.png"], "masks/cats/a.png");
  EXPECT_HAS(found["style/s.webp"], "no mask: ");
  try {
    find_masks(resolve(kCats + "conditioning_data_dir = 'nowhere'\n"));
    FAIL();
  } catch (const InputError& error) {
    EXPECT_HAS(std::string(error.what()), "[[datasets.subsets]] 1: conditioning_data_dir ");
    EXPECT_HAS(std::string(error.what()), "there is no such folder");
  }
}

TEST_F(DatasetFile, ListsByExtensionOfTheProfile) {
  for (const char* name : {"cats/d.Png", "cats/e.GIF", "cats/.hidden.png", "cats/f.png/inside.png"})
    folder.write(name, "x");
  EXPECT_EQ(resolve(kCats).images.size(), 4u);
  EXPECT_EQ(resolve(kCats, Profile::kKohya).images.size(), 2u);
}

TEST_F(DatasetFile, ReadsTheSameKeysFromJson) {
  const auto read = [&](const std::string& json) {
    return resolve_file(folder.write("set.json", json), Profile::kDefault, {}, folder.path());
  };
  const auto error = [&](const std::string& json) -> std::string {
    try {
      read(json);
    } catch (const InputError& e) {
      return e.what();
    }
    return "accepted";
  };
  const auto r = read(R"({"general": {"shuffle_caption": true, "caption_dropout_rate": 0.5},
      "datasets": [{"resolution": [96, 64], "subsets": [{"image_dir": "cats", "num_repeats": 3}]}]})");
  ASSERT_EQ(r.images.size(), 2u);
  EXPECT_EQ(r.subsets[0].pixels.width, 96);
  EXPECT_EQ(r.subsets[0].num_repeats, 3);
  EXPECT_TRUE(r.subsets[0].captions.shuffle);
  EXPECT_EQ(r.subsets[0].captions.dropout_rate, 0.5);
  EXPECT_HAS(error("{\n\"datasets\": [}"), "set.json: line 2: not JSON: unexpected '}'");
  EXPECT_HAS(error("[]"), "set.json: must be an object");
  EXPECT_HAS(error(R"({"general": {"flip_aug": null}})"), "general: flip_aug: null is no value");
  EXPECT_HAS(error(R"({"datasets": [{"resolution": 64, "resolutoin": 1, "subsets": [{}]}]})"),
             "did you mean resolution?");
  EXPECT_HAS(error(R"({"datasets": [{"resolution": 18446744073709551615}]})"), "out of range");
  EXPECT_HAS(error(std::string(1000, '[')), "nested too deeply");
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
  const std::string absolute = (folder / "cats/a.png").native();
  for (const std::string& other : {std::string("./a.png"), std::string("a"), absolute}) {
    folder.write("m.jsonl", "{\"image_path\": \"a.png\"}\n{\"image_path\": \"" + other + "\"}");
    EXPECT_HAS(error_of(toml), "m.jsonl: line 2: 'a.png' and '" + other + "' name one picture");
  }
  folder.write("m.jsonl", "{");
  EXPECT_HAS(error_of(toml), "m.jsonl: line 1: not JSON");
}

TEST_F(DatasetFile, FindsPicturesThatMetadataNamesWithoutAnEnding) {
  const std::string toml =
      "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = 'm.json'\nimage_dir = "
      "'cats'\n";
  folder.write("m.json",
               R"({"a": {"caption": "x"}, "b": {}, "v1.5": {}, "gone": {}, "c.png": {}})");
  folder.write("cats/v1.5.webp", "x");
  folder.write("cats/b.JPG", "x");
  const auto r = resolve(toml);
  ASSERT_EQ(r.images.size(), 5u);
  EXPECT_EQ(r.images[0].file, folder / "cats/a.png");
  EXPECT_EQ(r.images[0].name, "a");
  EXPECT_EQ(r.images[1].file, folder / "cats/b.JPG");
  EXPECT_EQ(r.images[2].file, folder / "cats/c.png");
  EXPECT_EQ(r.images[3].file, folder / "cats/gone");
  EXPECT_EQ(r.images[4].file, folder / "cats/v1.5.webp");
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

TEST_F(DatasetFile, DoesNotPassOverACaptionThatCannotBeReached) {
  std::filesystem::create_symlink("b.caption", folder / "cats/a.caption");
  std::filesystem::create_symlink("a.caption", folder / "cats/b.caption");  // a cycle
  const std::string name(245, 'n');  // with ".caption" no file can be called so
  folder.write("cats/" + name + ".png", "x");
  const auto r = resolve(kCats + "class_tokens = 'cat'\n");
  ASSERT_EQ(r.images.size(), 3u);
  EXPECT_THROW(read_caption(r, r.images[0]), InputError);
  EXPECT_EQ(read_caption(r, r.images[2]), "cat");
}

TEST_F(DatasetFile, FolderAloneNeedsAFolder) {
  for (const char* name : {"nowhere", "cats/a.png"}) {
    try {
      resolve_folder(folder / name, 64, 64, Profile::kDefault);
      FAIL() << name;
    } catch (const InputError& error) {
      EXPECT_HAS(std::string(error.what()), "hint: give the folder that holds the images");
    }
  }
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

TEST_F(DatasetFile, FindsAFolderTwiceHoweverItIsSpelled) {
  std::filesystem::create_directory_symlink(folder / "cats", folder / "link");
  const auto twice = [](const std::string& again) {
    return kCats + "[[datasets.subsets]]\nimage_dir = '" + again + "'\n";
  };
  for (const std::string& spelled : std::vector<std::string>{"cats",
                                                             "cats/",
                                                             "./cats",
                                                             "style/../cats",
                                                             "link",
                                                             "link/.",
                                                             (folder / "cats").native()}) {
    const auto error = error_of(twice(spelled));
    EXPECT_HAS(error, "set.toml: [[datasets]] 1: [[datasets.subsets]] 2: ");
    EXPECT_HAS(error, "is the same as in subset 1 of this dataset");
  }
  // sd-scripts compares the text alone
  const std::string out = "left out as sd-scripts does", again = "trained again as sd-scripts does";
  EXPECT_HAS(warnings_of(twice("cats"), Profile::kKohya), out);
  EXPECT_EQ(num_images, 2u);
  EXPECT_HAS(warnings_of(twice("cats/"), Profile::kKohya), again);
  EXPECT_EQ(num_images, 4u);
  EXPECT_HAS(
      warnings_of(twice("link") + "[[datasets.subsets]]\nimage_dir = 'link'\n", Profile::kKohya),
      out);
  EXPECT_EQ(num_images, 4u);
  // in another dataset it is another resolution
  EXPECT_EQ(error_of(kCats + "[[datasets]]\nresolution = 128\n[[datasets.subsets]]\nimage_dir = "
                             "'cats/'\n"),
            "accepted");
  folder.write("m.json", R"({"a.png": {"caption": "x"}})");
  EXPECT_HAS(error_of("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = "
                      "'m.json'\nimage_dir = 'cats'\n[[datasets.subsets]]\nmetadata_file = "
                      "'./m.json'\nimage_dir = 'cats'\n"),
             "./m.json is the same as in subset 1");
}

TEST_F(DatasetFile, WarnsOnceOfEachKeyWithoutEffect) {
  const std::string subset = "set.toml: [[datasets]] 1: [[datasets.subsets]] 1: key ",
                    dataset = "set.toml: [[datasets]] 1: key ", none = ": has no effect";
  const auto with =
      [](const std::string& general, const std::string& in_dataset, const std::string& in_subset) {
        return "[general]\n" + general + "\n[[datasets]]\nresolution = 64\n" + in_dataset +
               "\n[[datasets.subsets]]\nimage_dir = 'cats'\n" + in_subset + "\n";
      };
  const std::pair<const char*, const char*> kOfSubsets[] = {
      {"keep_tokens = 2", "shuffle_caption = true"},
      {"keep_tokens = 2", "caption_tag_dropout_rate = 0.1"},
      {"keep_tokens_separator = '|||'", "shuffle_caption = true"},
      {"caption_separator = ';'", "secondary_separator = ';;'"},
      {"token_warmup_min = 2", "token_warmup_step = 5"}};
  for (const auto& [text, needs] : kOfSubsets) {
    const std::string key = std::string(text).substr(0, std::string(text).find(' '));
    const auto alone = warnings_of(with("", "", text));
    EXPECT_HAS(alone, subset + key + none);
    EXPECT_EQ(std::count(alone.begin(), alone.end(), '\n'), 1) << alone;
    EXPECT_EQ(num_images, 2u);
    EXPECT_EQ(warnings_of(with("", "", std::string(text) + "\n" + needs)), "");
  }
  const std::pair<const char*, const char*> kOfDatasets[] = {
      {"validation_seed = 7", "validation_split = 0.5"},
      {"min_bucket_reso = 32", "enable_bucket = true"},
      {"max_bucket_reso = 512", "enable_bucket = true\nmin_bucket_reso = 32"},
      {"bucket_reso_steps = 32", "enable_bucket = true\nmin_bucket_reso = 32"},
      {"bucket_no_upscale = true", "enable_bucket = true\nmin_bucket_reso = 32"}};
  for (const auto& [text, needs] : kOfDatasets) {
    const std::string key = std::string(text).substr(0, std::string(text).find(' '));
    EXPECT_HAS(warnings_of(with("", text, "")), dataset + key + none);
    EXPECT_EQ(warnings_of(with("", std::string(text) + "\n" + needs, "")), "");
  }
  const auto no_upscale =
      with("", "enable_bucket = true\nmin_bucket_reso = 32\nbucket_no_upscale = true", "");
  EXPECT_HAS(warnings_of(no_upscale, Profile::kKohya), dataset + "min_bucket_reso" + none);
  EXPECT_EQ(warnings_of(no_upscale), "");
  // what asks for nothing
  EXPECT_EQ(warnings_of(with("keep_tokens = 0\nkeep_tokens_separator = ''\ncaption_separator = ','",
                             "bucket_no_upscale = false",
                             "cache_info = false")),
            "");
  EXPECT_HAS(warnings_of(with("", "", "cache_info = true")), subset + "cache_info" + none);
}

TEST_F(DatasetFile, WarnsOfAGeneralKeyOnlyIfNoSubsetUsesIt) {
  const std::string two = kCats + "[[datasets.subsets]]\nimage_dir = 'style'\n";
  const auto warning = warnings_of("[general]\nkeep_tokens = 1\n" + two);
  EXPECT_HAS(warning, "set.toml: [general]: key keep_tokens: has no effect");
  EXPECT_EQ(std::count(warning.begin(), warning.end(), '\n'), 1) << warning;
  EXPECT_EQ(warnings_of("[general]\nkeep_tokens = 1\n" + two + "shuffle_caption = true\n"), "");
  folder.write("m.json", R"({"a.png": {"caption": "x"}})");
  const std::string metadata =
      "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = 'm.json'\nimage_dir = "
      "'cats'\n";
  EXPECT_HAS(warnings_of("[general]\ncaption_extension = '.txt'\n" + metadata),
             "[general]: key caption_extension: has no effect: captions come from metadata_file");
  EXPECT_EQ(warnings_of("[general]\ncaption_extension = '.txt'\n" + metadata + kCats), "");
}

TEST_F(DatasetFile, NamesFileAndSubsetInEveryError) {
  const std::string first = "set.toml: [[datasets]] 1: ",
                    subset = first + "[[datasets.subsets]] 1: ",
                    head = "[[datasets]]\nresolution = 64\n";
  EXPECT_HAS(error_of(kCats + "color_aug = true\n"), subset + "option color_aug: changes");
  EXPECT_HAS(error_of("[general]\nrandom_crop = true\n" + kCats), subset + "option random_crop");
  EXPECT_HAS(error_of("[general]\nnetwork_multiplier = 0.5\n" + kCats),
             first + "option network_multiplier");
  EXPECT_HAS(error_of(head + "[[datasets.subsets]]\nimage_dir = 'nowhere'\n"),
             subset + "image_dir " + (folder / "nowhere").native() + ": there is no such folder");
  folder.write("empty/readme.md", "x");
  EXPECT_HAS(error_of(head + "[[datasets.subsets]]\nimage_dir = 'empty'\n"),
             "/empty: no images in it");
  EXPECT_HAS(error_of(head + "[[datasets.subsets]]\nmetadata_file = 'm.json'\n"),
             subset + "metadata_file ");
  folder.write("m.json", "{\n \"a.png\": {\"caption\": }\n}");
  const auto json = error_of(head + "[[datasets.subsets]]\nmetadata_file = 'm.json'\n");
  EXPECT_HAS(json, "m.json: line 2: not JSON: unexpected '}'");
  EXPECT_EQ(json.find("json.exception"), std::string::npos) << json;
  EXPECT_HAS(error_of(kCats + "num_repeats = 0\n"), "set.toml: the data set has no images");
  EXPECT_HAS(error_of("[general]\nvalidation_split = 1.0\n" + kCats),
             "set.toml: the data set has no images to train on");
  EXPECT_EQ(error_of(kCats + "[[datasets]]\nresolution = 64\nvalidation_split = "
                             "1.0\n[[datasets.subsets]]\nimage_dir = 'style'\n"),
            "accepted");
}

TEST_F(DatasetFile, SaysWhatIsNoTomlWithoutNamesOfLibraries) {
  const std::pair<const char*, const char*> kFiles[] = {
      {"a = 'x\n", "set.toml: line 1: not TOML: the next token is not a valid literal string"},
      {"a = 1\na = 2\n", "set.toml: line 2: not TOML: value (\"a\") already exists"},
      {"\na = tru\n", "set.toml: line 2: not TOML: the next token is not a boolean"},
      {"a = 1 2\n", "not TOML: invalid line format: expected newline, but got '2'."},
      {"a = \"C:\\users\"\n", "paths with it go in '...'"},
      {"[[datasets]\n", "set.toml: line 1: not TOML: an invalid key appeared"}};
  for (const auto& [text, wanted] : kFiles) {
    const auto error = error_of(text);
    EXPECT_HAS(error, wanted);
    for (const char* raw : {"toml::", "[error]", "-->"})
      EXPECT_EQ(error.find(raw), std::string::npos) << error;
  }
}

TEST_F(DatasetFile, SaysWhereAKeyBelongsAndWhatItHolds) {
  EXPECT_HAS(error_of("[general]\nalpha_mask = true\n" + kCats),
             "[general]: key alpha_mask cannot stand here\n  hint: it belongs in "
             "[[datasets.subsets]]");
  EXPECT_HAS(error_of(kCats + "batch_size = 2\n"), "it belongs in [general], [[datasets]]");
  EXPECT_HAS(error_of("[general]\nbatch_size = 'two'\n" + kCats),
             "must be a whole number, not \"two\"");
  EXPECT_HAS(error_of("[general]\nbatch_size = 2.0\n" + kCats), "a whole number, not 2.0");
  EXPECT_HAS(error_of("[general]\nresolution = [64, 64.5]\n" + kCats), "not [64, 64.5]");
  EXPECT_HAS(error_of("[[datasets]]\nresolution = 64\n"), "[[datasets.subsets]] is required");
  EXPECT_HAS(warnings_of(kCats + "caption_extension = 'txt'\n"),
             "key caption_extension: \"txt\" has no dot: the caption of x.png is xtxt");
  EXPECT_HAS(error_of("[[datasets]]\nresolution = 64\n[[datasets.subset]]\nimage_dir = 'cats'\n"),
             "did you mean subsets?");
  folder.write("m.json", R"({"a.png": {"caption": "x"}})");
  const std::string metadata =
      "[[datasets.subsets]]\nmetadata_file = 'm.json'\nimage_dir = 'cats'\n";
  const std::string head = "[[datasets]]\nresolution = 64\n";
  EXPECT_EQ(error_of(head + metadata), "accepted");
  EXPECT_HAS(error_of(head + "class_tokens = 'x'\n" + metadata),
             "key class_tokens cannot stand here\n  hint: subsets with metadata_file take no");
  EXPECT_HAS(error_of(head + metadata + "is_reg = true\n"), "key is_reg cannot stand here");
}

TEST_F(DatasetFile, NeedsNoResolutionForCaptionsAlone) {
  const auto file = folder.write("set.toml",
                                 "[[datasets]]\nenable_bucket = true\nmax_bucket_reso = "
                                 "256\n[[datasets.subsets]]\nimage_dir = 'cats'\n");
  const auto r = resolve_file(file, Profile::kDefault, {}, folder.path(), /*pixels=*/false);
  EXPECT_EQ(r.images.size(), 2u);
  EXPECT_NO_THROW(refuse_uncacheable(r));
  EXPECT_THROW(resolve_file(file, Profile::kDefault, {}, folder.path()), InputError);
}

}  // namespace
}  // namespace flux::dataset
