#include "common/train/gradient_clip.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <vector>

namespace flux {
namespace {

TEST(ClipGlobalNorm, ScalesAllTensorsByOneFactor) {
  const std::vector<at::Tensor> gradients{at::tensor({3.0f, 0.0f}),
                                          at::tensor({0.0f, 4.0f}).view({1, 2})};
  EXPECT_DOUBLE_EQ(clip_global_norm(gradients, 1.0), 5.0);
  EXPECT_FLOAT_EQ(gradients[0][0].item<float>(), 0.6f);
  EXPECT_FLOAT_EQ(gradients[1][0][1].item<float>(), 0.8f);
}

TEST(ClipGlobalNorm, LeavesSmallGradientsAloneAndCanBeOff) {
  const std::vector<at::Tensor> gradients{at::tensor({0.3f}), at::tensor({0.4f})};
  EXPECT_NEAR(clip_global_norm(gradients, 1.0), 0.5, 1e-7);
  EXPECT_FLOAT_EQ(gradients[0].item<float>(), 0.3f);
  EXPECT_NEAR(clip_global_norm(gradients, 0), 0.5, 1e-7);
  EXPECT_FLOAT_EQ(gradients[1].item<float>(), 0.4f);
  EXPECT_EQ(clip_global_norm({}, 1.0), 0);
}

TEST(ClipGlobalNorm, ShowsGradientsThatAreNotFinite) {
  const std::vector<at::Tensor> gradients{at::tensor({0.3f}),
                                          at::tensor({std::numeric_limits<float>::quiet_NaN()})};
  EXPECT_TRUE(std::isnan(clip_global_norm(gradients, 1.0)));
}

}  // namespace
}  // namespace flux
