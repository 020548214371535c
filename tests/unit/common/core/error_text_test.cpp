#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/core/error.h"
#include "common/core/reason.h"
#include "common/core/text.h"

namespace flux {
namespace {

using testing::Eq;
using testing::Optional;

TEST(Error, CarriesItsExitCodeAndHint) {
  const CacheError error("a.h5: schema 3, this build reads 1 to 2", "rebuild the cache");
  EXPECT_EQ(error.exit_code(), ExitCode::kCache);
  EXPECT_STREQ(error.what(), "a.h5: schema 3, this build reads 1 to 2\n  hint: rebuild the cache");
  EXPECT_STREQ(InputError("x").what(), "x");
}

TEST(Printable, EscapesWhatCouldSteerATerminal) {
  EXPECT_EQ(printable("caf\xC3\xA9 ok"), "caf\xC3\xA9 ok");
  EXPECT_EQ(printable("a\nb\tc\x1b[31m\x7f"), "a\\nb\\tc\\x1b[31m\\x7f");
  EXPECT_EQ(printable("\xff\xc0\xaf"), "\\xff\\xc0\\xaf");  // not UTF-8, overlong
  EXPECT_EQ(printable("\xC2\x85"), "\\xc2\\x85");           // C1 control
  EXPECT_EQ(printable("a\xE2\x80\xAE"
                      "b"),
            "a\\xe2\\x80\\xaeb");  // right-to-left override
}

TEST(Show, QuotesOnlyWhatNeedsIt) {
  EXPECT_EQ(show("dir/a.png"), "dir/a.png");
  EXPECT_EQ(show("my dir/a.png"), "'my dir/a.png'");
  EXPECT_EQ(show("a\nb"), "'a\\nb'");
  EXPECT_EQ(show(""), "''");
}

TEST(FirstInvalidUtf8, FindsTheFirstBadByte) {
  EXPECT_EQ(first_invalid_utf8("plain \xE2\x82\xAC \xF0\x9F\x98\x80"), std::nullopt);
  EXPECT_THAT(first_invalid_utf8("ab\x80"), Optional(Eq(2u)));
  EXPECT_THAT(first_invalid_utf8("\xED\xA0\x80"), Optional(Eq(0u)));      // surrogate
  EXPECT_THAT(first_invalid_utf8("\xF4\x90\x80\x80"), Optional(Eq(0u)));  // above U+10FFFF
  EXPECT_THAT(first_invalid_utf8("a\xE2\x82"), Optional(Eq(1u)));         // cut short
}

TEST(NearestName, OffersWhatWasMeantAndNothingFar) {
  const std::vector<std::string> names{"resolution", "batch-size", "out"};
  EXPECT_THAT(nearest_name("resolutoin", names), Optional(Eq("resolution")));
  EXPECT_THAT(nearest_name("batchsize", names), Optional(Eq("batch-size")));
  EXPECT_EQ(nearest_name("learning-rate", names), std::nullopt);
}

TEST(ShowNumbers, ReadsWell) {
  EXPECT_EQ(show_bytes(12), "12 B");
  EXPECT_EQ(show_bytes(1536), "1.5 KiB");
  EXPECT_EQ(show_seconds(3.21), "3.2 s");
  EXPECT_EQ(show_seconds(65), "1:05");
  EXPECT_EQ(show_seconds(3725), "1:02:05");
  EXPECT_EQ(join_some(std::vector<std::string>{"a", "b", "c"}, 2), "a, b and 1 more");
}

TEST(Text, ReadsSizes) {
  EXPECT_EQ(parse_bytes("20GiB"), int64_t{20} << 30);
  EXPECT_EQ(parse_bytes("1.5 kb"), 1500);
  EXPECT_EQ(parse_bytes("500MB"), 500'000'000);
  EXPECT_EQ(parse_bytes("4096"), 4096);
  for (const char* bad : {"", "GB", "-1", "1 GiG", "nan", "inf", "1e30TB", "1GB x"})
    EXPECT_EQ(parse_bytes(bad), std::nullopt) << bad;
}

TEST(Text, IsCutBetweenCharacters) {
  EXPECT_EQ(shortened("abc", 3), "abc");
  EXPECT_EQ(shortened("abcd", 3), "abc...");
  EXPECT_EQ(shortened("a\u00e9b", 2), "a...");  // the second byte of a letter
}

TEST(Reason, SaysWhatTomlParsersSayWithoutTheirNamesAndDrawings) {
  EXPECT_EQ(
      toml_reason("[error] toml::insert_value: value (\"a\") already exists.\n --> set.toml\n   |\n"
                  " 2 | a = 2 # --- x\n   |     ^--- value defined twice"),
      "value (\"a\") already exists: value defined twice");
  EXPECT_EQ(
      toml_reason(
          "[error] toml::parse_boolean: \n --> set.toml\n 1 | a = tru\n   |     ^--- the next "
          "token is not a boolean"),
      "the next token is not a boolean");
  EXPECT_EQ(toml_reason("[error] toml::parse_x: wrong\x1b\n   | ^--- here"), "wrong\\x1b");
  EXPECT_EQ(toml_reason(""), "cannot be read");
}

TEST(Reason, SaysWhatJsonParsersSayWithoutTheirNamesAndNumbers) {
  EXPECT_EQ(
      json_reason("[json.exception.parse_error.101] parse error at line 1, column 2: syntax error "
                  "while parsing object key - unexpected end of input; expected string literal"),
      "unexpected end of input; expected string literal");
  EXPECT_EQ(json_reason("[json.exception.type_error.302] type must be string, but is number"),
            "type must be string, but is number");
  EXPECT_EQ(json_reason("[json.exception.out_of_range.403] key 'model' not found"),
            "key 'model' not found");
  EXPECT_EQ(json_reason(""), "cannot be read");
}

}  // namespace
}  // namespace flux
