#include <gtest/gtest.h>

#include <cstring>

#include "common/core/error.h"
#include "common/image/image.h"

namespace flux::image {
namespace {

Rgb ramp(int64_t width, int64_t height) {
  Rgb image{{width, height}, {}};
  for (int64_t i = 0; i < width * height; ++i) {
    for (const int64_t v : {i % 251, i * 7 % 256, 255 - i % 256})
      image.data.push_back(static_cast<uint8_t>(v));
  }
  return image;
}

TEST(Resize, LanczosOfARow) {  // golden: Pillow 13.0.0, 4x1 to 8x1
  Rgb row{{4, 1}, {}};
  for (const int v : {0, 255, 255, 0}) row.data.insert(row.data.end(), 3, static_cast<uint8_t>(v));
  const auto out = resize(row, {8, 1}, Interpolation::kLanczos);
  EXPECT_EQ(out.size, (Size{8, 1}));
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(out.data[3 * i], out.data[3 * (7 - i)]) << i;
  EXPECT_EQ(out.data[0], 0);
  EXPECT_EQ(out.data[3 * 3], 255);
}

TEST(Resize, KeepsAFlatPictureFlat) {  // property: weights sum to one
  for (const auto kind : {Interpolation::kLanczos,
                          Interpolation::kBox,
                          Interpolation::kArea,
                          Interpolation::kCubic}) {
    for (const Size size : {Size{5, 9}, {37, 12}, {100, 3}}) {
      const auto out = resize({{17, 11}, std::vector<uint8_t>(17 * 11 * 3, 200)}, size, kind);
      EXPECT_EQ(out.data,
                std::vector<uint8_t>(static_cast<size_t>(size.width * size.height * 3), 200));
    }
  }
}

TEST(Resize, AutoUsesAreaOnlyWhenBothSidesShrink) {
  const auto image = ramp(40, 30);
  EXPECT_EQ(resize(image, {40, 30}, Interpolation::kAuto).data, image.data);
  EXPECT_EQ(resize(image, {20, 30}, Interpolation::kAuto).data,
            resize(image, {20, 30}, Interpolation::kArea).data);
  EXPECT_EQ(resize(image, {20, 31}, Interpolation::kAuto).data,
            resize(image, {20, 31}, Interpolation::kLanczos).data);
}

TEST(Place, EqualsResizeThenCrop) {  // property: the Lanczos window is the window of the whole
  const auto image = ramp(31, 23);
  const Placement p{{95, 70}, {64, 64}, 15, 3};
  const auto whole = resize(image, p.resized, Interpolation::kAuto);
  const auto window = place(image, p, Interpolation::kAuto);
  for (int64_t y = 0; y < 64; ++y) {
    EXPECT_EQ(std::memcmp(&window.data[3 * 64 * y], &whole.data[3 * (95 * (y + 3) + 15)], 3 * 64),
              0)
        << y;
  }
}

TEST(Place, FlipMirrorsLeftAndRight) {
  const auto image = ramp(5, 2);
  const Placement p{{5, 2}, {5, 2}, 0, 0};
  const auto flipped = place(image, p, Interpolation::kAuto, true);
  EXPECT_EQ(std::memcmp(&flipped.data[0], &image.data[12], 3), 0);
  EXPECT_EQ(std::memcmp(&flipped.data[6], &image.data[6], 3), 0);
  EXPECT_EQ(place(flipped, p, Interpolation::kAuto, true).data, image.data);
}

TEST(Place, OfAnExtremeRatioNeedsLittleMemory) {
  const Rgb image{{4096, 1}, std::vector<uint8_t>(4096 * 3, 7)};
  const Placement p{{4194304, 1024}, {768, 1024}, 2096768, 0};
  EXPECT_EQ(place(image, p, Interpolation::kAuto).data, std::vector<uint8_t>(768 * 1024 * 3, 7));
}

TEST(Pixels, AreMinusOneToOneChannelsFirst) {
  std::vector<float> out(6);
  to_pixels({{2, 1}, {0, 128, 255, 51, 0, 255}}, out);
  EXPECT_EQ(out,
            (std::vector<float>{-1.0f,
                                (51.0f / 255.0f - 0.5f) / 0.5f,
                                (128.0f / 255.0f - 0.5f) / 0.5f,
                                -1.0f,
                                1.0f,
                                1.0f}));
}

// A ramp whose alpha is another ramp.
Rgb ramp_with_alpha(int64_t width, int64_t height) {
  auto image = ramp(width, height);
  for (int64_t i = 0; i < width * height; ++i)
    image.alpha.push_back(static_cast<uint8_t>(i * 5 % 256));
  return image;
}

TEST(AlphaMask, IsTheMeanOfEachBlock) {  // golden: worked by hand
  Rgb image{{16, 8}, std::vector<uint8_t>(16 * 8 * 3), std::vector<uint8_t>(16 * 8, 255)};
  for (size_t y = 0; y < 8; ++y) image.alpha[16 * y] = 0;  // one column of the left block
  image.alpha[15] = 51;                                    // one pixel of the right
  const Placement whole{{16, 8}, {16, 8}, 0, 0};
  const auto left = static_cast<float>(56.0 / 64), right = static_cast<float>(63.2 / 64);
  EXPECT_EQ(alpha_mask(image, whole, Interpolation::kAuto), (std::vector<float>{left, right}));
  EXPECT_EQ(alpha_mask(image, whole, Interpolation::kAuto, true),
            (std::vector<float>{right, left}));
}

TEST(AlphaMask, FollowsThePicture) {  // property: alpha moves exactly as a grey picture of it does
  const auto image = ramp_with_alpha(41, 37);
  Rgb grey{image.size, {}};
  for (const uint8_t a : image.alpha) grey.data.insert(grey.data.end(), 3, a);
  for (const auto kind : {Interpolation::kAuto,
                          Interpolation::kLanczos,
                          Interpolation::kBox,
                          Interpolation::kArea,
                          Interpolation::kLinear,
                          Interpolation::kCubic,
                          Interpolation::kNearest}) {
    for (const Placement& p : {Placement{{41, 37}, {40, 32}, 1, 3},
                               {{33, 25}, {32, 24}, 1, 0},
                               {{83, 60}, {64, 56}, 9, 2}}) {
      const auto mask = alpha_mask(image, p, kind, true);
      const auto placed = place(grey, p, kind, true);
      ASSERT_EQ(std::ssize(mask), p.bucket.width / 8 * (p.bucket.height / 8));
      for (int64_t i = 0; i < std::ssize(mask); ++i) {
        const int64_t x = i % (p.bucket.width / 8) * 8, y = i / (p.bucket.width / 8) * 8;
        double sum = 0;
        for (int64_t j = 0; j < 64; ++j)
          sum += placed.data[static_cast<size_t>(3 * ((y + j / 8) * p.bucket.width + x + j % 8))];
        EXPECT_EQ(mask[static_cast<size_t>(i)], static_cast<float>(sum / (255.0 * 64)));
      }
    }
  }
}

TEST(AlphaMask, NeedsAlphaAndWholeBlocks) {
  const Placement p{{16, 16}, {16, 16}, 0, 0}, odd{{16, 16}, {16, 12}, 0, 0};
  EXPECT_THROW(alpha_mask(ramp(16, 16), p, Interpolation::kAuto), std::invalid_argument);
  EXPECT_THROW(alpha_mask(ramp_with_alpha(16, 16), odd, Interpolation::kAuto),
               std::invalid_argument);
}

TEST(Resize, WeightsStraightColoursByAlpha) {  // golden: Pillow 13.0.0, RGBA
  Rgb image{{2, 1}, {200, 100, 40, 10, 250, 90}, {90, 200}, true};
  EXPECT_EQ(resize(image, {7, 1}, Interpolation::kLanczos).data,
            (std::vector<uint8_t>{255, 0,  3,   227, 78, 33,  134, 152, 56,  70, 204,
                                  75,  28, 234, 85,  4,  253, 91,  0,   255, 95}));
  image.straight = false;
  EXPECT_EQ(resize(image, {7, 1}, Interpolation::kLanczos).data,
            resize({image.size, image.data}, {7, 1}, Interpolation::kLanczos).data);
}

TEST(Resize, ResultAboveTheLimitIsAnInputError) {
  const Rgb image{{100, 100}, std::vector<uint8_t>(30000)};
  EXPECT_THROW(resize(image, {20000, 20000}, Interpolation::kArea), InputError);
}

}  // namespace
}  // namespace flux::image
