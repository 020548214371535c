#include "common/dataset/caption.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/dataset/path_text.h"
#include "tests/support/temporary_folder.h"

namespace flux::dataset {
namespace {

/// Draws written down beforehand.
class Script : public Draws {
 public:
  explicit Script(nlohmann::json draws) : draws_(std::move(draws)) {}
  bool chance(double probability) override {
    return next("random").at("random").get<double>() < probability;
  }
  size_t choice(size_t n) override {
    const auto draw = next("choice");
    EXPECT_EQ(draw.at("of").get<size_t>(), n);
    return draw.at("choice");
  }
  std::vector<size_t> shuffle(size_t) override { return next("shuffle").at("shuffle"); }
  bool used_up() const { return at_ == draws_.size(); }

 private:
  nlohmann::json next(const char* kind) {
    if (at_ == draws_.size() || !draws_[at_].contains(kind))
      throw std::runtime_error(std::string("no draw left: ") + kind);
    return draws_[at_++];
  }
  nlohmann::json draws_;
  size_t at_ = 0;
};

std::string run(std::string_view caption,
                const CaptionOptions& options,
                const nlohmann::json& draws = nlohmann::json::array()) {
  Script script(draws);
  const auto out = process_caption(caption, options, {}, script);
  EXPECT_TRUE(script.used_up());
  return out;
}

TEST(CaptionProgram, JoinsPrefixAndSuffixWithOneSpace) {
  CaptionOptions o;
  o.prefix = "p,", o.suffix = "s";
  EXPECT_EQ(run("a cat\nsecond line", o), "p, a cat");
  EXPECT_EQ(run("a cat", o), "p, a cat s");
}

TEST(CaptionProgram, KeepsTagsAroundTheSeparatorInPlace) {  // golden: worked by hand
  CaptionOptions o;
  o.shuffle = true, o.keep_tokens_separator = "|||";
  EXPECT_EQ(run("a, b ||| c, d, , e ||| f", o, {{{"shuffle", {2, 0, 1}}}}), "a, b, e, c, d, f");
  o.keep_tokens = 1;
  EXPECT_EQ(run("a,b,c", o, {{{"shuffle", {1, 0}}}}), "a, c, b");
}

TEST(CaptionProgram, ChoosesAmongBracesAndLines) {
  CaptionOptions o;
  o.wildcards = true;
  EXPECT_EQ(run("x\n{a|b} {{c}} {}", o, {{{"choice", 1}, {"of", 2}}, {{"choice", 1}, {"of", 2}}}),
            "b {c} {}");
}

TEST(CaptionProgram, SecondarySeparatorBecomesTheSeparator) {
  CaptionOptions o;
  o.secondary_separator = ";;;";
  EXPECT_EQ(run("a;;;b, c", o), "a,b, c");
}

TEST(CaptionVariants, AreEnumeratedWithExactProbabilities) {  // golden: worked by hand
  CaptionOptions o;
  o.wildcards = true;
  const auto variants = caption_variants("{a|b|a|c} x", o, 8, 0);
  ASSERT_EQ(variants.size(), 3u);
  EXPECT_EQ(variants[0].text, "a x");
  EXPECT_EQ(variants[0].weight, 0.5);
  EXPECT_EQ(variants[1].weight, 0.25);
  o = {};
  o.tag_dropout_rate = 0.25;
  const auto dropped = caption_variants("a, b", o, 8, 0);
  ASSERT_EQ(dropped.size(), 4u);
  EXPECT_EQ(dropped[0].text, "");
  EXPECT_EQ(dropped[0].weight, 0.0625);
  EXPECT_EQ(dropped[1].text, "a");
  EXPECT_EQ(dropped[1].weight, 0.1875);
  EXPECT_EQ(dropped[2].weight, 0.5625);
}

TEST(CaptionVariants, AreDrawnByKeyWhenThereAreMany) {  // property
  CaptionOptions o;
  o.shuffle = true;
  const auto variants = caption_variants("a, b, c, d, e, f, g, h, i, j, k, l", o, 8, 5);
  EXPECT_EQ(variants.size(), 8u);
  double sum = 0;
  for (const auto& v : variants) {
    sum += v.weight;
    EXPECT_EQ(v.text.size(), 12 + 11 * 2u);
  }
  EXPECT_NEAR(sum, 1, 1e-12);
  const auto again = caption_variants("a, b, c, d, e, f, g, h, i, j, k, l", o, 8, 5);
  EXPECT_EQ(variants[3].text, again[3].text);
  EXPECT_NE(variants[0].text,
            caption_variants("a, b, c, d, e, f, g, h, i, j, k, l", o, 8, 6)[0].text);
}

TEST(CaptionVariants, LeaveDropoutToTraining) {
  CaptionOptions o;
  o.dropout_rate = 0.5, o.dropout_every_n_epochs = 1;
  const auto variants = caption_variants("a cat", o, 8, 0);
  ASSERT_EQ(variants.size(), 1u);
  EXPECT_EQ(variants[0].text, "a cat");
}

TEST(CaptionFile, TakesTheFirstLineOrAll) {
  const test::TemporaryFolder folder;
  const auto file = folder.write("c.txt", "\xEF\xBB\xBF  first \r\n\r\n second\u00a0\rthird");
  EXPECT_EQ(read_caption_file(file, false, Profile::kDefault), "first");
  EXPECT_EQ(read_caption_file(file, true, Profile::kDefault), "first\nsecond\nthird");
  EXPECT_EQ(read_caption_file(file, false, Profile::kKohya), "\xEF\xBB\xBF  first");
  EXPECT_EQ(read_caption_file(folder.write("n.txt", "\nx"), false, Profile::kDefault), "");
  EXPECT_EQ(read_caption_file(
                folder.write("nul.txt", std::string_view("a\0b", 3)), false, Profile::kDefault),
            std::string("a\0b", 3));
}

TEST(CaptionFile, WarnsOfBlanks) {
  const test::TemporaryFolder folder;
  const auto warnings_of = [&](std::string_view bytes, bool wildcards) {
    const auto file = folder.write("c.txt", bytes);
    testing::internal::CaptureStderr();
    const bool empty = read_caption_file(file, wildcards, Profile::kDefault).empty();
    const auto said = testing::internal::GetCapturedStderr();
    EXPECT_EQ(empty, !said.empty()) << said;
    return said;
  };
  for (const bool wildcards : {false, true}) {
    EXPECT_NE(warnings_of("", wildcards).find("c.txt: an empty caption file"), std::string::npos);
    for (const char* bytes : {" \t ", "\n", "\xEF\xBB\xBF", "\u00a0\n \n"})
      EXPECT_NE(warnings_of(bytes, wildcards).find("an empty caption"), std::string::npos);
    EXPECT_EQ(warnings_of("x\n\n", wildcards), "");
  }
  EXPECT_NE(warnings_of("\nx", false).find("its first line is blank"), std::string::npos);
  EXPECT_EQ(warnings_of("\nx", true), "");
}

TEST(CaptionFile, RefusesWhatIsNotUtf8) {
  const test::TemporaryFolder folder;
  const auto file = folder.write("latin1.txt", "caf\xE9 x");
  try {
    read_caption_file(file, false, Profile::kDefault);
    FAIL();
  } catch (const InputError& error) {
    EXPECT_NE(std::string(error.what()).find("latin1.txt: not UTF-8 at byte 3"), std::string::npos)
        << error.what();
  }
  EXPECT_THROW(read_caption_file(folder.write("e.txt", ""), false, Profile::kKohya), InputError);
  EXPECT_EQ(read_caption_file(folder.write("e.txt", ""), false, Profile::kDefault), "");
}

TEST(PathText, IsLossless) {
  EXPECT_EQ(path_text("a b/ü.png"), "a b/ü.png");
  EXPECT_EQ(path_text("a\\b\xFF\n"), "a\\\\b\\xff\n");
  std::string all;
  for (int i = 255; i > 0; --i) all += static_cast<char>(i);
  EXPECT_EQ(path_bytes(path_text(all)), all);
  EXPECT_FALSE(nlohmann::json(path_text(all)).dump().empty());  // valid UTF-8
  EXPECT_THROW(path_bytes("a\\n"), std::invalid_argument);
}

}  // namespace
}  // namespace flux::dataset
