// Damaged dataset files: refused with an InputError that names the file, or read, twice the same. No
// crash, no hang. A changed number is another data set, so a mutant may be read as something else.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/dataset/dataset.h"
#include "tests/support/mutants.h"
#include "tests/support/temporary_folder.h"

namespace flux::dataset {
namespace {

using test::Verdict;

constexpr char kFile[] = R"([general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1
enable_bucket = true
bucket_reso_steps = 64

[[datasets]]
resolution = [96, 64]
batch_size = 2
min_bucket_reso = 64
max_bucket_reso = 512
bucket_no_upscale = true
validation_split = 0.25
validation_seed = 3

  [[datasets.subsets]]
  image_dir = 'cats'
  num_repeats = 3
  flip_aug = true
  caption_prefix = "a photo of "
  caption_dropout_rate = 0.1
  caption_tag_dropout_rate = 0.2
  keep_tokens_separator = "|||"

  [[datasets.subsets]]
  image_dir = "reg"
  class_tokens = 'cat'
  is_reg = true

[[datasets]]
resolution = 64
enable_bucket = false

  [[datasets.subsets]]
  metadata_file = 'meta.json'
  image_dir = 'style'
  enable_wildcard = true
  shuffle_caption = false
)";

// Every other mutant is one of bytes; the rest have a line less, twice, elsewhere, or with another
// value, so that what lies behind the TOML parser is reached.
std::string mutant_of_lines(std::string bytes, uint64_t i) {
  if (i % 2 == 0) return test::mutant(std::move(bytes), i);
  const RandomStream random(test::mutant_seed(), Purpose::kShuffle, i);
  auto lines = split(bytes, '\n');
  const auto place = static_cast<size_t>(random.below(0, lines.size()));
  const auto other = static_cast<size_t>(random.below(1, lines.size()));
  constexpr const char* kValues[] = {
      "-1",          "0",          "1e999",        "nan",        "9223372036854775807",
      "''",          "[]",         "{}",           "true",       "'..'",
      "'/dev/zero'", "1979-05-27", "[64, 64, 64]", "[[1]]",      "'\\u0000'",
      "\"\\u0000\"", "'a\xff'",    "0.5",          "1000000000", "'/'"};
  const std::string line = lines[place];
  const auto equals = line.find('=');
  switch (i / 2 % 4) {
    case 0:
      lines.erase(lines.begin() + static_cast<std::ptrdiff_t>(place));
      break;
    case 1:
      lines.insert(lines.begin() + static_cast<std::ptrdiff_t>(other), line);
      break;
    case 2:
      std::swap(lines[place], lines[other]);
      break;
    case 3:
      if (equals != std::string::npos)
        lines[place] =
            line.substr(0, equals + 1) + " " + kValues[random.below(2, std::size(kValues))];
      break;
  }
  return fmt::format("{}", fmt::join(lines, "\n"));
}

// Everything that was read, as text.
std::string everything(const Resolved& resolved) {
  std::string out = plan_json(resolved).dump();
  for (const auto& subset : resolved.subsets) {
    const auto& p = subset.pixels;
    out += fmt::format("\n{} {} {} {} {} {} {} {} {} {} {} {} {}",
                       subset.folder.native(),
                       subset.metadata_file.native(),
                       subset.class_tokens,
                       fmt::join(subset.caption_extensions, ","),
                       p.width,
                       p.height,
                       p.buckets,
                       p.min_side,
                       p.max_side,
                       p.steps,
                       p.no_upscale,
                       p.interpolation,
                       subset.flip_aug);
  }
  for (const auto& image : resolved.images) {
    out += fmt::format("\n{} {} {} {} {} {} {}",
                       image.subset,
                       image.name,
                       image.file.native(),
                       to_hex(image.item),
                       image.repeats,
                       image.validation,
                       image.metadata_caption.value_or("-"));
    out += read_caption(resolved, image).value_or("none");
  }
  return out;
}

class DatasetMutants : public testing::TestWithParam<Profile> {};

TEST_P(DatasetMutants, AreRefusedByNameOrReadTwiceTheSame) {
  log::start("mutation_test", log::Level::kError);
  const test::TemporaryFolder folder;
  for (const char* name : {"cats/a.png", "cats/b.jpg", "cats/c.webp", "reg/r.png", "style/s.png"})
    folder.write(name, "x");
  for (const char* name : {"cats/a.txt", "cats/b.txt", "cats/c.txt"}) folder.write(name, "a, b, c");
  folder.write("meta.json", R"({"s": {"caption": "a {red|blue} style"}})");
  const auto file = folder.write("set.toml", kFile);
  const auto read = [&] {
    const auto resolved = resolve_file(file, GetParam(), {}, folder.path());
    std::string out = everything(resolved);
    try {
      refuse_uncacheable(resolved);
    } catch (const InputError& error) {
      out += error.what();
    }
    return out;
  };
  const std::string original = read();
  const auto verdicts = test::judge_mutants(
      file,
      [&] {
        try {
          const std::string found = read();
          if (read() != found) return Verdict::kWrong;
          return found == original ? Verdict::kIdentical : Verdict::kOther;
        } catch (const InputError& error) {
          const std::string text = error.what();
          // the dataset file, or the folder or file that it names, in quotes if it has odd letters
          if (!text.starts_with('/') && !text.starts_with("'/"))
            throw std::runtime_error("the message names no file: " + text);
          return Verdict::kRefused;
        }
      },
      mutant_of_lines);
  EXPECT_GT(verdicts.refused, verdicts.all() / 4);
}

INSTANTIATE_TEST_SUITE_P(Profiles,
                         DatasetMutants,
                         testing::Values(Profile::kDefault, Profile::kKohya),
                         [](const auto& tested) {
                           return tested.param == Profile::kKohya ? "Kohya" : "Default";
                         });

}  // namespace
}  // namespace flux::dataset
