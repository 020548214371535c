#include "common/image/encode.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "common/core/error.h"
#include "common/core/hash.h"

namespace flux::image {
namespace {

Rgb gradient(int64_t width, int64_t height) {
  Rgb image;
  image.size = {width, height};
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x)
      for (const int64_t value :
           {x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)})
        image.data.push_back(static_cast<uint8_t>(value));
  return image;
}

std::string as_text(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

int largest_difference(const Rgb& a, const Rgb& b) {
  EXPECT_EQ(a.size, b.size);
  int largest = 0;
  for (size_t i = 0; i < std::min(a.data.size(), b.data.size()); ++i)
    largest = std::max(largest, std::abs(a.data[i] - b.data[i]));
  return largest;
}

const std::string kPrompt = "a red circle\nSteps: 4, Seed: 1";
const std::string kUmlaut = "ein grüner Käse 🧀\nSteps: 4";

TEST(EncodePicture, PngIsExactAndHoldsItsTexts) {
  const Rgb image = gradient(37, 21);
  const auto file = encode(image, {.texts = {{"parameters", kPrompt}, {"other", kUmlaut}}});
  EXPECT_EQ(largest_difference(decode(file), image), 0);
  const std::string text = as_text(file);
  EXPECT_THAT(text, testing::HasSubstr(std::string("tEXtparameters\0", 15) + kPrompt));
  EXPECT_THAT(text, testing::HasSubstr(std::string("iTXtother\0\0\0\0\0", 14) + kUmlaut));
  EXPECT_EQ(file, encode(image, {.texts = {{"parameters", kPrompt}, {"other", kUmlaut}}}));
}

TEST(EncodePicture, JpegAndWebpHoldTheFirstTextAsUserComment) {
  const Rgb image = gradient(64, 48);
  for (const FileFormat format : {FileFormat::kJpeg, FileFormat::kWebp}) {
    const auto file =
        encode(image, {.format = format, .quality = 95, .texts = {{"parameters", kPrompt}}});
    EXPECT_LT(largest_difference(decode(file), image), 16) << extension(format);
    EXPECT_EQ(read_header(file).size, image.size);
    EXPECT_EQ(read_header(file).orientation, 1);
    EXPECT_THAT(as_text(file), testing::HasSubstr(as_text(exif_comment(kPrompt))))
        << extension(format);
  }
}

TEST(EncodePicture, QualityDecides) {
  const Rgb image = gradient(64, 48);
  for (const FileFormat format : {FileFormat::kJpeg, FileFormat::kWebp})
    EXPECT_LT(encode(image, {.format = format, .quality = 20}).size(),
              encode(image, {.format = format, .quality = 98}).size());
  EXPECT_EQ(largest_difference(decode(encode(image, {.format = FileFormat::kWebp, .quality = 100})),
                               image),
            0);
}

TEST(EncodePicture, OddSizesAndNoText) {
  for (const FileFormat format : {FileFormat::kPng, FileFormat::kJpeg, FileFormat::kWebp})
    for (const auto& [width, height] : {std::pair{1, 1}, {3, 5}, {17, 1}}) {
      const Rgb image = gradient(width, height);
      EXPECT_EQ(decode(encode(image, {.format = format, .quality = 100, .texts = {}})).size,
                image.size);
      EXPECT_EQ(
          decode(encode(image, {.format = format, .quality = 95, .texts = {{"parameters", "x"}}}))
              .size,
          image.size);
    }
}

TEST(EncodePicture, WhatAFormatCannotHoldIsRefused) {
  Rgb image;
  image.size = {16384, 1};
  image.data.resize(16384 * 3);
  EXPECT_THROW(encode(image, {.format = FileFormat::kWebp, .texts = {}}), InputError);
  EXPECT_NO_THROW(encode(image, {.format = FileFormat::kJpeg, .texts = {}}));
  EXPECT_THROW(encode(gradient(4, 4),
                      {.format = FileFormat::kJpeg, .texts = {{"a", std::string(70'000, 'x')}}}),
               InputError);
}

TEST(ExifComment, IsTiffWithOneComment) {
  const std::string ascii = as_text(exif_comment("ab"));
  EXPECT_EQ(ascii.substr(0, 4), std::string("MM\0*", 4));
  EXPECT_EQ(ascii.substr(ascii.size() - 10), std::string("ASCII\0\0\0ab", 10));
  const std::string wide = as_text(exif_comment("é🧀"));
  EXPECT_EQ(wide.substr(wide.size() - 14), std::string("UNICODE\0\x00\xE9\xD8\x3E\xDD\xC0", 14));
}

}  // namespace
}  // namespace flux::image
