// Pictures drawn here and encoded by OpenCV, with what OpenCV does not write put in by hand.
#include <gtest/gtest.h>
#include <lcms2.h>
#include <zlib.h>

#include <cstdlib>
#include <opencv2/imgcodecs.hpp>
#include <string>

#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/image/image.h"

namespace flux::image {
namespace {

std::string encode(const char* type, const cv::Mat& picture) {
  std::vector<uint8_t> bytes;
  cv::imencode(
      type, picture, bytes, {cv::IMWRITE_JPEG_QUALITY, 100, cv::IMWRITE_WEBP_QUALITY, 101});
  return {bytes.begin(), bytes.end()};
}

Rgb decode_text(const std::string& bytes, const DecodeOptions& options = {}) {
  return decode(as_bytes(bytes), options);
}

// Left half red, right half blue.
cv::Mat halves(int width, int height) {
  cv::Mat picture(height, width, CV_8UC3, cv::Scalar(0, 0, 255));
  picture.colRange(width / 2, width).setTo(cv::Scalar(255, 0, 0));
  return picture;
}

std::string with_segment(const std::string& jpeg, char marker, const std::string& payload) {
  const auto size = payload.size() + 2;
  return jpeg.substr(0, 2) + '\xFF' + marker + static_cast<char>(size >> 8) +
         static_cast<char>(size & 255) + payload + jpeg.substr(2);
}

std::string exif(char orientation) {
  return std::string("Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0", 24) + orientation +
         std::string(7, '\0');
}

bool near(const Rgb& image, int64_t x, int64_t y, std::array<int, 3> color, int tolerance = 0) {
  for (size_t c = 0; c < 3; ++c) {
    const int value = image.data[static_cast<size_t>(3 * (y * image.size.width + x)) + c];
    if (std::abs(value - color[c]) > tolerance) return false;
  }
  return true;
}

constexpr std::array<int, 3> kRed{255, 0, 0}, kBlue{0, 0, 255};

TEST(DrawnPicture, IsTheSameInEveryLosslessType) {
  for (const char* type : {".png", ".bmp", ".webp", ".tiff"}) {
    SCOPED_TRACE(type);
    const auto image = decode_text(encode(type, halves(6, 4)));
    EXPECT_EQ(image.size, (Size{6, 4}));
    EXPECT_TRUE(near(image, 0, 0, kRed));
    EXPECT_TRUE(near(image, 5, 3, kBlue));
  }
}

TEST(DrawnPicture, IsTurnedByExifInProfileDefaultOnly) {
  const auto jpeg = encode(".jpg", halves(48, 16));
  const auto turned = decode_text(with_segment(jpeg, '\xE1', exif(6)));
  EXPECT_EQ(turned.size, (Size{16, 48}));
  EXPECT_TRUE(near(turned, 8, 4, kRed, 6));  // what was left is up
  EXPECT_TRUE(near(turned, 8, 44, kBlue, 6));
  EXPECT_EQ(decode_text(with_segment(jpeg, '\xE1', exif(6)), {Profile::kKohya, {}}).size,
            (Size{48, 16}));
  EXPECT_TRUE(near(decode_text(with_segment(jpeg, '\xE1', exif(2))), 4, 8, kBlue, 6));
  EXPECT_EQ(decode_text(with_segment(jpeg, '\xE1', exif(9))).data, decode_text(jpeg).data);
  EXPECT_EQ(
      decode_text(with_segment(jpeg, '\xE1', std::string("Exif\0\0MM\0*\xFF\xFF\xFF\xFF", 14)))
          .data,
      decode_text(jpeg).data);
}

TEST(Header, SaysTheSizeThatDecodingGives) {
  for (const char* type : {".jpg", ".png", ".webp", ".bmp", ".tiff"}) {
    const auto file = encode(type, halves(24, 16));
    EXPECT_EQ(read_header(as_bytes(file)).decoded_size(Profile::kDefault), (Size{24, 16})) << type;
  }
  const auto turned = with_segment(encode(".jpg", halves(48, 16)), '\xE1', exif(6));
  const auto header = read_header(as_bytes(turned));
  EXPECT_EQ(header.orientation, 6);
  EXPECT_EQ(header.decoded_size(Profile::kDefault), decode_text(turned).size);
  EXPECT_EQ(header.decoded_size(Profile::kKohya), (Size{48, 16}));
  EXPECT_THROW(read_header(as_bytes("nothing")), InputError);
}

TEST(DrawnPicture, IsCompositedOverTheBackground) {
  cv::Mat picture(1, 3, CV_8UC4);
  picture.at<cv::Vec4b>(0, 0) = {10, 20, 30, 0};  // blue, green, red, alpha
  picture.at<cv::Vec4b>(0, 1) = {10, 20, 30, 255};
  picture.at<cv::Vec4b>(0, 2) = {10, 20, 30, 51};
  for (const char* type : {".png", ".webp"}) {
    const auto file = encode(type, picture);
    const auto white = decode_text(file);
    EXPECT_TRUE(near(white, 0, 0, {255, 255, 255}));
    EXPECT_TRUE(near(white, 1, 0, {30, 20, 10}));
    EXPECT_TRUE(near(white, 2, 0, {210, 208, 206}));
    const auto green = decode_text(file, {Profile::kDefault, {0, 255, 0}});
    EXPECT_TRUE(near(green, 0, 0, {0, 255, 0}));
    EXPECT_TRUE(near(decode_text(file, {Profile::kKohya, {}}), 1, 0, {30, 20, 10}));
  }
}

constexpr DecodeOptions kWithAlpha{.alpha = true},
    kKohyaWithAlpha{.profile = Profile::kKohya, .alpha = true};

TEST(AlphaPlane, StandsBesideThePicture) {
  cv::Mat picture(1, 3, CV_8UC4);
  picture.at<cv::Vec4b>(0, 0) = {10, 20, 30, 0};  // blue, green, red, alpha
  picture.at<cv::Vec4b>(0, 1) = {10, 20, 30, 255};
  picture.at<cv::Vec4b>(0, 2) = {10, 20, 30, 51};
  for (const char* type : {".png", ".webp"}) {
    SCOPED_TRACE(type);
    const auto file = encode(type, picture);
    for (const auto& options : {kWithAlpha, kKohyaWithAlpha}) {
      const auto image = decode_text(file, options);
      EXPECT_EQ(image.alpha, (std::vector<uint8_t>{0, 255, 51}));
      EXPECT_EQ(image.straight, options.profile == Profile::kKohya);
      EXPECT_EQ(image.data, decode_text(file, {options.profile}).data);  // which gives no alpha:
      EXPECT_TRUE(decode_text(file, {options.profile}).alpha.empty());
    }
  }
  for (const char* type : {".png", ".webp", ".jpg", ".bmp", ".tiff"}) {
    EXPECT_TRUE(decode_text(encode(type, halves(6, 4)), kWithAlpha).alpha.empty()) << type;
  }
}

TEST(AlphaPlane, SixteenBitsBecomeEight) {
  cv::Mat picture(1, 2, CV_16UC4);
  picture.at<cv::Vec4w>(0, 0) = {0, 0, 0, 65535};
  picture.at<cv::Vec4w>(0, 1) = {0, 0, 0, 100 * 257 + 200};  // nearest is 101, its high byte 101
  const auto file = encode(".png", picture);
  EXPECT_EQ(decode_text(file, kWithAlpha).alpha, (std::vector<uint8_t>{255, 101}));
  EXPECT_EQ(decode_text(file, kKohyaWithAlpha).alpha, (std::vector<uint8_t>{255, 101}));
}

std::string png_chunk(const std::string& type_and_data) {
  uint32_t crc = 0xFFFFFFFF;
  for (const char c : type_and_data) {
    crc ^= static_cast<uint8_t>(c);
    for (int i = 0; i < 8; ++i) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
  }
  const auto be = [](uint32_t v) {
    return std::string{static_cast<char>(v >> 24),
                       static_cast<char>(v >> 16),
                       static_cast<char>(v >> 8),
                       static_cast<char>(v)};
  };
  return be(static_cast<uint32_t>(type_and_data.size() - 4)) + type_and_data + be(~crc);
}

/// Puts chunks behind the head of a PNG file.
std::string with_chunks(const std::string& png, const std::string& chunks) {
  return png.substr(0, 33) + chunks + png.substr(33);
}

TEST(AlphaPlane, TransparentColoursAreAlpha) {
  // 8-bit palette of three colours, of which two have an entry in tRNS; stored deflate block
  using namespace std::string_literals;
  const auto palette =
      "\x89PNG\r\n\x1A\n"s + png_chunk("IHDR\0\0\0\x03\0\0\0\x01\x08\x03\0\0\0"s) +
      png_chunk("PLTE\x01\x02\x03\x04\x05\x06\x07\x08\x09"s) + png_chunk("tRNS\0\x80"s) +
      png_chunk("IDAT\x78\x01\x01\x04\0\xFB\xFF\0\0\x01\x02\0\x08\0\x04"s) + png_chunk("IEND");
  EXPECT_EQ(decode_text(palette, kWithAlpha).alpha, (std::vector<uint8_t>{0, 128, 255}));
  EXPECT_EQ(decode_text(palette, kKohyaWithAlpha).alpha, (std::vector<uint8_t>{0, 128, 255}));
  EXPECT_EQ(decode_text(palette, kKohyaWithAlpha).data,
            (std::vector<uint8_t>{1, 2, 3, 4, 5, 6, 7, 8, 9}));
  // one transparent colour of RGB: red
  const auto red = with_chunks(encode(".png", halves(2, 1)), png_chunk("tRNS\0\xFF\0\0\0\0"s));
  EXPECT_EQ(decode_text(red, kWithAlpha).alpha, (std::vector<uint8_t>{0, 255}));
}

TEST(AlphaPlane, TurnsWithThePicture) {
  cv::Mat picture(1, 3, CV_8UC4, cv::Scalar(0, 0, 0, 255));
  picture.at<cv::Vec4b>(0, 0)[3] = 7;
  const auto turned = with_chunks(encode(".png", picture), png_chunk("eXIf" + exif(8).substr(6)));
  const auto image = decode_text(turned, kWithAlpha);
  EXPECT_EQ(image.size, (Size{1, 3}));
  EXPECT_EQ(image.alpha, (std::vector<uint8_t>{255, 255, 7}));  // what was left is at the bottom
  EXPECT_EQ(decode_text(turned, kKohyaWithAlpha).alpha, (std::vector<uint8_t>{7, 255, 255}));
}

TEST(DrawnPicture, SixteenBitsAreScaledOrClipped) {
  cv::Mat grey(1, 3, CV_16UC1);
  grey.at<uint16_t>(0, 0) = 128, grey.at<uint16_t>(0, 1) = 129 * 257,
                       grey.at<uint16_t>(0, 2) = 65535;
  for (const char* type : {".png", ".tiff"}) {
    EXPECT_EQ(decode_text(encode(type, grey)).data,
              (std::vector<uint8_t>{0, 0, 0, 129, 129, 129, 255, 255, 255}));
    EXPECT_EQ(decode_text(encode(type, grey), {Profile::kKohya, {}}).data,
              (std::vector<uint8_t>{128, 128, 128, 255, 255, 255, 255, 255, 255}));
  }
}

TEST(DrawnPicture, CutAnywhereIsRefused) {
  for (const char* type : {".jpg", ".png", ".webp", ".bmp", ".tiff"}) {
    SCOPED_TRACE(type);
    const auto file = encode(type, halves(40, 24));
    EXPECT_NO_THROW(decode_text(file));
    for (size_t size = 0; size + 2 < file.size(); size += 1 + file.size() / 97) {
      EXPECT_THROW(decode_text(file.substr(0, size)), InputError) << size;
    }
  }
}

TEST(DrawnPicture, FlippedBitsNeverCrash) {  // property
  for (const char* type : {".jpg", ".png", ".webp", ".bmp", ".tiff"}) {
    const auto file = encode(type, halves(24, 24));
    for (size_t i = 0; i < file.size(); i += 1 + file.size() / 300) {
      auto damaged = file;
      damaged[i] = static_cast<char>(damaged[i] ^ (1 << (i % 8)));
      try {
        decode_text(damaged);
      } catch (const InputError&) {
      }
    }
  }
}

std::string linear_profile() {
  cmsToneCurve* gamma = cmsBuildGamma(nullptr, 1.0);
  cmsToneCurve* curves[] = {gamma, gamma, gamma};
  const cmsCIExyY white{0.3127, 0.3290, 1};
  const cmsCIExyYTRIPLE primaries{{0.64, 0.33, 1}, {0.30, 0.60, 1}, {0.15, 0.06, 1}};
  const auto profile = cmsCreateRGBProfile(&white, &primaries, curves);
  cmsUInt32Number size = 0;
  cmsSaveProfileToMem(profile, nullptr, &size);
  std::string bytes(size, '\0');
  cmsSaveProfileToMem(profile, bytes.data(), &size);
  cmsCloseProfile(profile);
  cmsFreeToneCurve(gamma);
  return bytes;
}

TEST(DrawnPicture, ColourProfileBecomesSrgb) {
  const auto jpeg = encode(".jpg", cv::Mat(16, 16, CV_8UC3, cv::Scalar(55, 55, 55)));
  const auto tagged =
      with_segment(jpeg, '\xE2', std::string("ICC_PROFILE\0\x01\x01", 14) + linear_profile());
  EXPECT_TRUE(near(decode_text(jpeg), 8, 8, {55, 55, 55}, 1));
  EXPECT_TRUE(
      near(decode_text(tagged), 8, 8, {128, 128, 128}, 2));  // linear 55/255 is 0.502 in sRGB
  EXPECT_TRUE(near(decode_text(tagged, {Profile::kKohya, {}}), 8, 8, {55, 55, 55}, 1));
  EXPECT_THROW(decode_text(with_segment(
                   jpeg, '\xE2', std::string("ICC_PROFILE\0\x01\x01", 14) + "nonsense")),
               InputError);
}

// The PNG with a chunk before its pixels.
std::string with_chunk(const std::string& png, std::string name, const std::string& content) {
  const auto big_endian = [](uLong value) {
    std::string bytes;
    for (int shift = 24; shift >= 0; shift -= 8) bytes += static_cast<char>(value >> shift & 255);
    return bytes;
  };
  constexpr size_t kHeaderEnd = 33;
  name += content;
  const auto sum =
      crc32(0, reinterpret_cast<const Bytef*>(name.data()), static_cast<uInt>(name.size()));
  return png.substr(0, kHeaderEnd) + big_endian(content.size()) + name + big_endian(sum) +
         png.substr(kHeaderEnd);
}

std::string icc_chunk(const std::string& png, const std::string& icc) {
  std::string packed(compressBound(icc.size()), '\0');
  uLongf size = packed.size();
  compress(reinterpret_cast<Bytef*>(packed.data()),
           &size,
           reinterpret_cast<const Bytef*>(icc.data()),
           icc.size());
  return with_chunk(png, "iCCP", std::string("icc\0\0", 5) + packed.substr(0, size));
}

TEST(DrawnPicture, ColourProfileOfPngIsNeverPassedOver) {
  const auto rgb = encode(".png", cv::Mat(16, 16, CV_8UC3, cv::Scalar(55, 55, 55)));
  const auto grey = encode(".png", cv::Mat(16, 16, CV_8UC1, cv::Scalar(55)));
  for (const auto& png : {rgb, grey}) {  // libpng drops an RGB profile of a grey picture
    EXPECT_TRUE(near(decode_text(icc_chunk(png, linear_profile())), 8, 8, {128, 128, 128}, 2));
    EXPECT_TRUE(near(
        decode_text(icc_chunk(png, linear_profile()), {Profile::kKohya, {}}), 8, 8, {55, 55, 55}));
    for (const auto& bad : {icc_chunk(png, "nonsense"),
                            icc_chunk(png, linear_profile().substr(0, 100)),
                            with_chunk(png, "iCCP", std::string("icc\0\0nonsense", 13)),
                            with_chunk(png, "iCCP", "icc")}) {
      EXPECT_THROW(decode_text(bad), InputError);
      EXPECT_NO_THROW(decode_text(bad, {Profile::kKohya, {}}));
    }
  }
}

// A GIF of 1x1 pixels with so many frames.
std::string tiny_gif(int frames) {
  using namespace std::string_literals;
  std::string file = "GIF89a\1\0\1\0\x80\0\0\0\0\0\xFF\xFF\xFF"s;
  for (int i = 0; i < frames; ++i) file += "\x2C\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"s;
  return file + ";";
}

TEST(Animation, IsSeenInTheFile) {
  EXPECT_FALSE(read_header(as_bytes(tiny_gif(1))).animated);
  EXPECT_TRUE(read_header(as_bytes(tiny_gif(2))).animated);
  EXPECT_TRUE(read_header(as_bytes(tiny_gif(3))).animated);
  std::string cut = tiny_gif(2);
  cut.resize(cut.size() - 14);  // inside the second frame's head
  EXPECT_TRUE(read_header(as_bytes(cut)).animated);
}

}  // namespace
}  // namespace flux::image
