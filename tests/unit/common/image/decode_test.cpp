#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/image/image.h"
#include "formats/safetensors/reader.h"
#include "tests/support/shared_data.h"

namespace flux::image {
namespace {

Rgb decode_text(const std::string& bytes, const DecodeOptions& options = {}) {
  return decode(as_bytes(bytes), options);
}

std::string error_of(const std::string& bytes) {
  try {
    decode_text(bytes);
  } catch (const InputError& error) {
    return error.what();
  }
  return "accepted";
}

std::string le(uint32_t value, int bytes) {
  std::string out;
  for (int i = 0; i < bytes; ++i) out += static_cast<char>(i < 4 ? value >> (8 * i) : 0);
  return out;
}

/// 24-bit BMP of `width` x `height`, rows from the bottom, blue first.
std::string bmp(int32_t width, int32_t height, const std::string& pixels) {
  return "BM" + le(static_cast<uint32_t>(54 + pixels.size()), 4) + le(0, 4) + le(54, 4) +
         le(40, 4) + le(static_cast<uint32_t>(width), 4) + le(static_cast<uint32_t>(height), 4) +
         le(1, 2) + le(24, 2) + le(0, 24) + pixels;
}

TEST(Decode, Bmp) {  // golden: worked by hand
  const auto image = decode_text(bmp(1, 2, std::string("\x01\x02\x03\0\x04\x05\x06\0", 8)));
  EXPECT_EQ(image.size, (Size{1, 2}));
  EXPECT_EQ(image.data, (std::vector<uint8_t>{6, 5, 4, 3, 2, 1}));
}

TEST(Decode, RefusesBmpWithMissingRowsAndBombs) {
  EXPECT_NE(error_of(bmp(1, 9, std::string(8, 'x'))).find("truncated"), std::string::npos);
  EXPECT_NE(error_of(bmp(60000, 60000, "")).find("limit"), std::string::npos);
  EXPECT_NE(error_of(bmp(-3, 5, std::string(60, 'x'))).find("-3x5"), std::string::npos);
}

TEST(Decode, NamesWhatIsNotAPicture) {
  EXPECT_NE(error_of("").find("empty"), std::string::npos);
  EXPECT_NE(error_of("<html>").find("not a picture"), std::string::npos);
  EXPECT_NE(error_of("version https://git-lfs.github.com/spec/v1\n").find("Git LFS"),
            std::string::npos);
  EXPECT_NE(error_of(std::string("\0\0\0\x20"
                                 "ftypavif",
                                 12))
                .find("AVIF"),
            std::string::npos);
}

TEST(Decode, EqualsPillowOnTheReferenceFiles) {
  FLUX_SHARED_DATA_OR_SKIP(folder, "golden/data/images");
  const auto images = nlohmann::json::parse(std::ifstream(folder / "expected.json")).at("images");
  const auto pixels = safetensors::File::open(folder / "decoded.safetensors");
  const auto check = [&](const nlohmann::json& e, const char* form, const DecodeOptions& options) {
    if (!e.contains(form)) return;
    SCOPED_TRACE(form);
    const std::string name = e.at("file");
    Rgb out;
    ASSERT_NO_THROW(out = decode_text(read_file(folder / name), options));
    EXPECT_EQ(out.size, (Size{e.at(form).at("width"), e.at(form).at("height")}));
    const auto bytes = read_file(folder / name);
    EXPECT_EQ(read_header(as_bytes(bytes)).decoded_size(options.profile), out.size);
    if (e.at("lossless") && name.find("rgb16") == std::string::npos &&
        name.find("rgba16") == std::string::npos) {
      EXPECT_EQ(to_hex(sha256(std::as_bytes(std::span(out.data)))), e.at(form).at("sha256"));
      return;
    }
    const auto* t = pixels->find(std::string(form) + "/" + name);
    if (t == nullptr) t = pixels->find("kohya/" + name);
    ASSERT_EQ(t->bytes.size(), out.data.size());
    int worst = 0;
    double sum = 0;
    for (size_t i = 0; i < out.data.size(); ++i) {
      const int diff = std::abs(int{out.data[i]} - static_cast<int>(t->bytes[i]));
      worst = std::max(worst, diff), sum += diff;
    }
    EXPECT_LE(worst, e.at("lossless") ? 1 : 3);
    EXPECT_LE(sum / static_cast<double>(out.data.size()), 0.5);
  };
  for (const auto& e : images) {
    SCOPED_TRACE(e.at("file"));
    if (e.value("refuse", false)) {
      for (const auto profile : {Profile::kDefault, Profile::kKohya}) {
        EXPECT_THROW(decode_text(read_file(folder / e.at("file")), {profile, {}}), InputError);
      }
      continue;
    }
    check(e, "kohya", {Profile::kKohya, {}});
    check(e, "proper", {});
    check(e, "over_white", {});
    check(e, "over_black", {Profile::kDefault, {0, 0, 0}});
  }
}

TEST(Decode, GivesTheRecordedVerdictOnHostileFiles) {
  FLUX_SHARED_DATA_OR_SKIP(folder, "golden/hostile");
  const auto index = nlohmann::json::parse(std::ifstream(folder / "index.json"));
  for (const auto& e : index.at("images")) {
    SCOPED_TRACE(e.at("file"));
    const auto verdict = error_of(read_file(folder / e.at("file")));
    const bool accepted = verdict == "accepted";
    EXPECT_TRUE(e.at("expect") == "policy" || accepted == (e.at("expect") == "accept")) << verdict;
    if (std::getenv("FLUX_VERBOSE") != nullptr)
      std::printf("%s: %s\n", e.at("file").dump().c_str(), verdict.c_str());
  }
}

}  // namespace
}  // namespace flux::image
