#include <gtest/gtest.h>

#include <string>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/image/image.h"

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

}  // namespace
}  // namespace flux::image
