#include "formats/samples/samples.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "common/core/error.h"
#include "common/core/file.h"
#include "tests/support/temporary_folder.h"

namespace flux::samples {
namespace {

using testing::HasSubstr;

std::vector<float> values(uint32_t height, uint32_t width, float start) {
  std::vector<float> out(static_cast<size_t>(kChannels) * height * width);
  for (size_t i = 0; i < out.size(); ++i) out[i] = start + std::sin(static_cast<float>(i));
  return out;
}

Header header() {
  return {.settings = {{"model", "flux.safetensors"}, {"steps", 28}, {"guidance", 3.5}},
          .model_sha256 = std::string(64, 'a'),
          .provenance = {"flux-sample", "0.1.0", "--seed 1", "cpu"},
          .created = "2026-01-01T00:00:00Z"};
}

std::vector<Record> records() {
  std::vector<Record> out;
  out.push_back(prepare({.prompt = "a cat",
                         .negative = "",
                         .prompt_number = 3,
                         .index = 0,
                         .seed = 1,
                         .height = 4,
                         .width = 6},
                        values(4, 6, 0)));
  out.push_back(prepare({.prompt = "eine Käseglocke\n\"\\",
                         .negative = "a dog",
                         .prompt_number = 7,
                         .index = 2,
                         .seed = ~uint64_t{0},
                         .height = 6,
                         .width = 4},
                        values(6, 4, 1)));
  out.push_back(prepare({.prompt = "",
                         .negative = "",
                         .prompt_number = 8,
                         .index = 0,
                         .seed = 1,
                         .height = 4,
                         .width = 6},
                        values(4, 6, 2)));
  return out;
}

std::filesystem::path write(const std::filesystem::path& path,
                            const std::vector<std::byte>& bytes) {
  write_file_atomic(path, {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  return path;
}

std::string refusal(const std::filesystem::path& path) {
  try {
    const File file(path);
    for (int64_t i = 0; i < std::ssize(file.pictures()); ++i) file.latents(i);
  } catch (const CacheError& error) {
    return error.what();
  }
  return "nothing was refused";
}

TEST(Samples, ComeBackAsTheyWere) {
  const test::TemporaryFolder folder;
  const auto all = records();
  const auto path = write(folder.path() / "samples.h5", encode(header(), all));
  EXPECT_TRUE(is_samples_file(path));
  const File file(path);
  EXPECT_EQ(file.header().settings, header().settings);
  EXPECT_EQ(file.header().model_sha256, header().model_sha256);
  EXPECT_EQ(file.header().provenance, header().provenance);
  EXPECT_EQ(file.header().created, header().created);
  ASSERT_EQ(file.pictures().size(), all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    const Info &wanted = all[i].info, &found = file.pictures()[i];
    EXPECT_EQ(found.prompt, wanted.prompt);
    EXPECT_EQ(found.negative, wanted.negative);
    EXPECT_EQ(found.prompt_number, wanted.prompt_number);
    EXPECT_EQ(found.index, wanted.index);
    EXPECT_EQ(found.seed, wanted.seed);
    EXPECT_EQ(file.latents(static_cast<int64_t>(i)),
              values(wanted.height, wanted.width, static_cast<float>(i)));
  }
}

TEST(Samples, EqualContentHasEqualBytes) {
  EXPECT_EQ(encode(header(), records()), encode(header(), records()));
}

TEST(Samples, WrongNumberOfValuesIsABug) {
  EXPECT_THROW(prepare({.prompt = "", .negative = "", .height = 4, .width = 4}, values(4, 6, 0)),
               std::invalid_argument);
  EXPECT_THROW(encode(header(), {}), std::invalid_argument);
}

TEST(Samples, OtherFilesAreRefused) {
  const test::TemporaryFolder folder;
  write_file_atomic(folder.path() / "text.h5", "this is no HDF5 file");
  EXPECT_FALSE(is_samples_file(folder.path() / "text.h5"));
  EXPECT_FALSE(is_samples_file(folder.path() / "absent.h5"));
  EXPECT_NE(refusal(folder.path() / "text.h5"), "nothing was refused");
  cache::Hdf5Image other;
  other.attribute("format", "flux-cache");
  const auto path = write(folder.path() / "cache.h5", other.finish());
  EXPECT_FALSE(is_samples_file(path));
  EXPECT_THAT(refusal(path), HasSubstr("is no file of samples"));
  cache::Hdf5Image newer;
  newer.attribute("format", kFormat);
  newer.attribute("schema_version", int64_t{7});
  newer.attribute("tool", "flux-sample");
  newer.attribute("tool_version", "9.0.0");
  EXPECT_THAT(refusal(write(folder.path() / "newer.h5", newer.finish())),
              HasSubstr("schema 7, this build reads 1 to 1\n  written by flux-sample 9.0.0"));
}

// Refused, or as it was: never another picture, never a crash.
TEST(Samples, MutatedFilesAreRefusedOrRead) {
  const test::TemporaryFolder folder;
  const auto good = encode(header(), records());
  const File original(write(folder.path() / "good.h5", good));
  int refused = 0;
  for (size_t at = 0; at < good.size(); at += 1 + good.size() / 400) {
    auto bad = good;
    bad[at] ^= std::byte{0x41};
    const auto path = write(folder.path() / "bad.h5", bad);
    try {
      const File file(path);
      for (int64_t i = 0; i < std::ssize(file.pictures()); ++i) {
        const auto found = file.latents(i);
        const bool comparable =
            i < std::ssize(original.pictures()) && found.size() == original.latents(i).size();
        if (comparable) {
          EXPECT_EQ(found, original.latents(i)) << "byte " << at;
        }
      }
    } catch (const CacheError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 50);
  for (const size_t size : {size_t{0}, size_t{100}, good.size() / 2, good.size() - 1}) {
    const auto path = write(folder.path() / "short.h5",
                            {good.begin(), good.begin() + static_cast<ptrdiff_t>(size)});
    EXPECT_NE(refusal(path), "nothing was refused") << size;
  }
}

}  // namespace
}  // namespace flux::samples
