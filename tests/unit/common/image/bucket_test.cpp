#include "common/image/bucket.h"

#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>

#include "common/core/error.h"

namespace flux::image {
namespace {

BucketOptions options(
    Size resolution, int64_t min_side, int64_t max_side, int64_t steps, Profile profile) {
  BucketOptions o;
  o.resolution = resolution, o.min_side = min_side, o.max_side = max_side, o.steps = steps,
  o.profile = profile;
  return o;
}

TEST(KohyaBuckets, AreTheListOfSdScripts) {  // golden: sd-scripts, 512x512 in steps of 64
  const Buckets buckets(options({512, 512}, 256, 1024, 64, Profile::kKohya));
  const std::vector<Size> expected = {{256, 832},
                                      {256, 896},
                                      {256, 960},
                                      {256, 1024},
                                      {320, 704},
                                      {320, 768},
                                      {384, 640},
                                      {448, 576},
                                      {512, 512},
                                      {576, 448},
                                      {640, 384},
                                      {704, 320},
                                      {768, 320},
                                      {832, 256},
                                      {896, 256},
                                      {960, 256},
                                      {1024, 256}};
  EXPECT_EQ(buckets.list(), expected);
}

TEST(KohyaBuckets, PickByLinearRatioAndCropTheCentre) {  // golden: sd-scripts, plans v08
  const Buckets buckets(options({128, 128}, 64, 256, 32, Profile::kKohya));
  EXPECT_EQ(buckets.place({96, 64}), (Placement{{160, 107}, {160, 96}, 0, 5}));
  EXPECT_EQ(buckets.place({130, 60}), (Placement{{208, 96}, {160, 96}, 24, 0}));
  EXPECT_EQ(buckets.place({48, 200}), (Placement{{64, 267}, {64, 256}, 0, 5}));
}

TEST(KohyaBuckets, WithoutUpscalingRefuseSidesUnderOneStep) {
  auto o = options({512, 512}, 256, 1024, 64, Profile::kKohya);
  o.no_upscale = true;
  EXPECT_EQ(Buckets(o).place({300, 200}), (Placement{{300, 200}, {256, 192}, 22, 4}));
  EXPECT_THROW(Buckets(o).place({63, 200}), InputError);
  EXPECT_THROW(Buckets(o).place({1, 1}), InputError);
}

TEST(Buckets, RefuseLimitsThatExcludeTheResolution) {
  EXPECT_THROW(Buckets(options({512, 512}, 640, 1024, 64, Profile::kDefault)),
               std::invalid_argument);
  EXPECT_THROW(Buckets(options({1280, 720}, 256, 1024, 64, Profile::kKohya)),
               std::invalid_argument);
  EXPECT_THROW(Buckets(options({0, 512}, 0, 1024, 64, Profile::kKohya)), std::invalid_argument);
}

TEST(DefaultBuckets, KeepAreaAndTreatPortraitLikeLandscape) {  // property
  const Buckets buckets(options({1024, 1024}, 32, 4096, 16, Profile::kDefault));
  for (const auto& b : buckets.list()) {
    EXPECT_EQ(b.width % 16, 0);
    EXPECT_EQ(b.height % 16, 0);
    EXPECT_NEAR(static_cast<double>(b.width * b.height) / (1024.0 * 1024.0), 1.0, 0.04)
        << b.width << "x" << b.height;
  }
  for (const Size image : {Size{4032, 3024}, {1920, 1080}, {640, 480}, {3000, 1000}, {1213, 887}}) {
    const auto across = buckets.place(image), upright = buckets.place({image.height, image.width});
    EXPECT_EQ(across.bucket, (Size{upright.bucket.height, upright.bucket.width}));
    EXPECT_GE(across.resized.width, across.bucket.width);
    EXPECT_GE(across.resized.height, across.bucket.height);
    const double image_ratio = static_cast<double>(image.width) / static_cast<double>(image.height);
    const double bucket_ratio =
        static_cast<double>(across.bucket.width) / static_cast<double>(across.bucket.height);
    EXPECT_LT(std::abs(std::log(image_ratio / bucket_ratio)), 0.02);
  }
  EXPECT_EQ(buckets.place({2048, 2048}).bucket, (Size{1024, 1024}));
}

TEST(DefaultBuckets, WithoutUpscalingKeepSmallPictures) {
  auto o = options({512, 512}, 32, 2048, 16, Profile::kDefault);
  o.no_upscale = true;
  const Buckets buckets(o);
  EXPECT_EQ(buckets.place({100, 75}), (Placement{{100, 75}, {96, 64}, 2, 5}));
  EXPECT_EQ(buckets.place({1024, 1024}), (Placement{{512, 512}, {512, 512}, 0, 0}));
  EXPECT_THROW(buckets.place({15, 300}), InputError);
}

TEST(Buckets, Disabled) {
  auto o = options({768, 1024}, 256, 1024, 64, Profile::kKohya);
  o.enabled = false;
  EXPECT_EQ(Buckets(o).place({4096, 1}).resized, (Size{4194304, 1024}));
}

}  // namespace
}  // namespace flux::image
