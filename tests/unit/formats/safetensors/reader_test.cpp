#include "formats/safetensors/reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <fstream>
#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "tests/support/temporary_folder.h"

namespace flux::safetensors {
namespace {

using test::TemporaryFolder;
using testing::ElementsAre;
using testing::HasSubstr;

/// A file with this header text and so many bytes of data.
std::string file_of(std::string_view header, size_t data_bytes) {
  const auto length = std::bit_cast<std::array<char, 8>>(uint64_t{header.size()});
  std::string file(length.data(), length.size());
  file += header;
  for (size_t i = 0; i < data_bytes; ++i) file += static_cast<char>(i + 1);
  return file;
}
std::string one(std::string_view dtype, std::string_view shape, std::string_view offsets) {
  return std::string(R"({"w":{"dtype":")")
             .append(dtype)
             .append(R"(","shape":)")
             .append(shape)
             .append(R"(,"data_offsets":)")
             .append(offsets) +
         "}}";
}

Contents parse_text(const std::string& file) { return parse(std::as_bytes(std::span(file)), "f"); }

/// The message of the refusal, or "" if the file is accepted.
std::string refusal(const std::string& file) {
  try {
    parse_text(file);
  } catch (const InputError& e) {
    return e.what();
  }
  return "";
}

TEST(SafetensorsParse, ReadsTensorsInOrderOfTheirBytes) {
  const std::string file = file_of(
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"U8","shape":[2,1],"data_offsets":[4,6]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}  )",
      6);
  const Contents contents = parse_text(file);
  ASSERT_EQ(contents.tensors.size(), 2u);
  EXPECT_EQ(contents.tensors[0].name, "a");
  EXPECT_THAT(contents.tensors[0].shape, ElementsAre());
  EXPECT_EQ(contents.tensors[1].name, "b");
  EXPECT_EQ(contents.tensors[1].dtype, DType::kU8);
  EXPECT_THAT(contents.tensors[1].shape, ElementsAre(2, 1));
  EXPECT_THAT(contents.tensors[1].bytes, ElementsAre(std::byte{5}, std::byte{6}));
  EXPECT_EQ(contents.metadata.at("format"), "pt");
}

// Five mistakes that other C++ readers were found to make.
TEST(SafetensorsParse, RefusesAProductThatWraps) {  // 4194305^2 * 2^k wraps to a few bytes
  EXPECT_THAT(refusal(file_of(one("F32", "[4294967296,4294967296]", "[0,4]"), 4)),
              HasSubstr("overflows"));
  EXPECT_THAT(refusal(file_of(one("F32", "[4611686018427387905]", "[0,4]"), 4)),
              HasSubstr("overflows"));
}
TEST(SafetensorsParse, RefusesOffsetsThatDisagreeWithTheShape) {
  EXPECT_THAT(refusal(file_of(one("F32", "[2]", "[0,4]"), 4)),
              HasSubstr("needs 8 bytes, the offsets give 4"));
}
TEST(SafetensorsParse, RefusesNegativeAndInvertedOffsets) {
  EXPECT_THAT(refusal(file_of(one("U8", "[4]", "[-4,0]"), 4)), HasSubstr("-4"));
  EXPECT_THAT(refusal(file_of(one("U8", "[4]", "[4,0]"), 4)), HasSubstr("ends before it begins"));
}
TEST(SafetensorsParse, RefusesAZeroSizeTensorInsideAnother) {
  EXPECT_THAT(
      refusal(file_of(
          R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"z":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}})",
          4)),
      HasSubstr("overlaps"));
}
TEST(SafetensorsParse, RefusesCountsWithoutBounds) {
  std::string shape = "[1";
  for (int64_t i = 0; i < kMaxRank; ++i) shape += ",1";
  EXPECT_THAT(refusal(file_of(one("U8", shape + "]", "[0,1]"), 1)), HasSubstr("dimensions"));
  EXPECT_THAT(refusal(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)),
              HasSubstr("header of"));
}

TEST(SafetensorsParse, NamesWhatIsNotSafetensors) {
  const std::pair<std::string, std::string> kFiles[] = {
      {"GGUF\3\0\0\0aaaaaaaaaaaa", "GGUF"},
      {std::string("PK\3\4\0\0\0\0\0\xff\xff\xff", 12), "zip archive"},
      {std::string("\x80\2\x8a\nl\xfc\x9c\x46\xf9\x20\x6a", 11), "pickle"},
      {"<!DOCTYPE html><html>", "web page"},
      {"\n <HTML>\nrate limited", "web page"},
      {"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "Git LFS"},
      {"a photo of a cat, sitting", "text file"},
      {"short", "text file"},
      {"", "empty"},
  };
  for (const auto& [bytes, kind] : kFiles) EXPECT_THAT(refusal(bytes), HasSubstr(kind)) << bytes;
}

TEST(SafetensorsParse, ShowsNamesEscaped) {
  EXPECT_THAT(refusal(file_of(R"({"\u001b[31m":{"dtype":"F32","shape":[1]}})", 4)),
              HasSubstr("\\x1b"));
}

TEST(SafetensorsParse, GivesTheRecordedVerdictOnHostileFiles) {
  const std::filesystem::path golden =
      std::filesystem::path(FLUX_SOURCE_DIR) / "tests/golden/hostile";
  const auto index = nlohmann::json::parse(read_file(golden / "index.json"));
  int num_refused = 0, num_accepted = 0;
  for (const auto& entry : index["safetensors"]) {
    const std::string name = entry["file"], expect = entry["expect"];
    bool refused = false;
    try {
      File::open(golden / name);
    } catch (const InputError& e) {
      refused = true;
      EXPECT_THAT(e.what(), HasSubstr(std::filesystem::path(name).filename().native()));
    }
    EXPECT_EQ(refused, expect != "accept")
        << name << ": " << entry["why"];  // the two left open are refused
    ++(refused ? num_refused : num_accepted);
  }
  EXPECT_EQ(num_refused, 84);
  EXPECT_EQ(num_accepted, 17);
}

class SafetensorsSet : public testing::Test {
 protected:
  std::string tensor(std::string_view name, std::string_view value = "x") {
    return file_of(R"({")" + std::string(name) +
                       R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                   0) +
           std::string(value);
  }
  std::string open_refusal(const std::filesystem::path& path) {
    try {
      open_set(path);
    } catch (const InputError& e) {
      return e.what();
    }
    return "";
  }
  void write_shards() {
    folder.write("m-00001-of-00002.safetensors", tensor("a"));
    folder.write("m-00002-of-00002.safetensors", tensor("b"));
  }
  std::filesystem::path write_index(const std::string& map, const std::string& extra = "") {
    return folder.write("m.safetensors.index.json",
                        R"({"metadata":{"total_size":2},"weight_map":{)" + map + "}" + extra + "}");
  }
  TemporaryFolder folder;
  const std::string good_map =
      R"("a":"m-00001-of-00002.safetensors","b":"m-00002-of-00002.safetensors")";
};

TEST_F(SafetensorsSet, OpensFolderIndexAndFirstShard) {
  write_shards();
  EXPECT_EQ(open_set(folder.path()).files.size(), 2u);  // without an index
  EXPECT_EQ(open_set(folder / "m-00001-of-00002.safetensors").files.size(), 2u);
  EXPECT_THAT(open_refusal(folder / "m-00002-of-00002.safetensors"),
              HasSubstr("m-00001-of-00002.safetensors"));
  const auto index = write_index(good_map);
  EXPECT_EQ(open_set(index).files.size(), 2u);
  EXPECT_EQ(open_set(folder.path()).files[1]->find("b")->bytes[0], std::byte{'x'});
}

TEST_F(SafetensorsSet, RefusesAnAbsentShard) {
  folder.write("m-00001-of-00002.safetensors", tensor("a"));
  EXPECT_THAT(open_refusal(folder / "m-00001-of-00002.safetensors"), HasSubstr("shard 2 of 2"));
  EXPECT_THAT(open_refusal(write_index(good_map)), HasSubstr("m-00002-of-00002.safetensors"));
}

TEST_F(SafetensorsSet, RefusesATensorInTwoShards) {
  folder.write("m-00001-of-00002.safetensors", tensor("a"));
  folder.write("m-00002-of-00002.safetensors", tensor("a"));
  EXPECT_THAT(open_refusal(folder / "m-00001-of-00002.safetensors"), HasSubstr("'a' is in"));
}

TEST_F(SafetensorsSet, RefusesAnIndexThatDisagreesWithItsShards) {
  write_shards();
  EXPECT_THAT(open_refusal(write_index(
                  R"("a":"m-00001-of-00002.safetensors","c":"m-00002-of-00002.safetensors")")),
              AllOf(HasSubstr("in no shard: c"), HasSubstr("not listed: b")));
  EXPECT_THAT(open_refusal(write_index(
                  R"("b":"m-00001-of-00002.safetensors","a":"m-00002-of-00002.safetensors")")),
              HasSubstr("2 listed in another shard: a, b"));
  EXPECT_THAT(open_refusal(write_index(
                  R"("a":"m-00001-of-00002.safetensors","a":"m-00002-of-00002.safetensors")")),
              HasSubstr("twice"));
  EXPECT_THAT(open_refusal(folder.write("x.safetensors.index.json", "{}")),
              HasSubstr("weight_map"));
  EXPECT_THAT(open_refusal(folder.write("x.safetensors.index.json", "{")), HasSubstr("JSON"));
}

TEST_F(SafetensorsSet, NeverLeavesTheFolder) {
  write_shards();
  for (const char* name : {"../m.safetensors", "/etc/passwd", "..", "a\\\\b", "a\\u0000b", ""}) {
    EXPECT_THAT(open_refusal(write_index(std::string(R"("a":")") + name + "\"")),
                HasSubstr("not a plain file name"))
        << name;
  }
}

TEST_F(SafetensorsSet, AsksWhichOfSeveralFilesIsMeant) {
  EXPECT_THAT(open_refusal(folder.path()), HasSubstr("no .safetensors file"));
  folder.write("a.safetensors", tensor("a"));
  EXPECT_EQ(open_set(folder.path()).files.size(), 1u);
  folder.write("b.safetensors", tensor("b"));
  EXPECT_THAT(open_refusal(folder.path()), HasSubstr("a.safetensors, b.safetensors"));
}

TEST(SafetensorsFile, StaysReadableWhenItsNameIsGone) {
  TemporaryFolder folder;
  const auto path = folder.write("a.safetensors", file_of(one("U8", "[3]", "[0,3]"), 3));
  const auto file = File::open(path);
  std::filesystem::remove(path);
  EXPECT_EQ(file->find("w")->bytes[2], std::byte{3});
  EXPECT_EQ(file->find("v"), nullptr);
  EXPECT_EQ(file->stamp().size_bytes, file_of(one("U8", "[3]", "[0,3]"), 3).size());
}

}  // namespace
}  // namespace flux::safetensors
