#include "common/train/flow_matching.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

#include "common/train/sampler.h"

namespace flux {
namespace {

TEST(NoisedLatents, MixesBySigmaPerSample) {
  const auto latents = at::full({3, 16, 2, 2}, 2.0), noise = at::full({3, 16, 2, 2}, 10.0);
  const auto x_t = noised_latents(latents, noise, at::tensor({0.0f, 0.25f, 1.0f}));
  EXPECT_FLOAT_EQ(x_t[0][5][1][0].item<float>(), 2.0f);
  EXPECT_FLOAT_EQ(x_t[1][5][1][0].item<float>(), 4.0f);
  EXPECT_FLOAT_EQ(x_t[2][5][1][0].item<float>(), 10.0f);
}

TEST(NoisedLatents, SteppingBackAlongVelocityRestoresLatents) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const auto gen = at::make_generator<at::CPUGeneratorImpl>(seed);
    const auto latents = at::randn({4, 16, 8, 6}, gen), noise = at::randn({4, 16, 8, 6}, gen);
    const auto sigma = at::rand({4}, gen);
    const auto back = noised_latents(latents, noise, sigma) -
                      sigma.view({-1, 1, 1, 1}) * velocity_target(latents, noise);
    EXPECT_LT((back - latents).abs().max().item<float>(), 2e-6f);
  }
}

TEST(NoisedLatents, KeepsTheDtypeAndMixesInFloat32) {
  const auto latents = at::full({1, 16, 2, 2}, 1.0, at::kBFloat16),
             noise = at::full({1, 16, 2, 2}, -1.0, at::kBFloat16);
  const auto x_t = noised_latents(latents, noise, at::tensor({0.501f}));
  EXPECT_EQ(x_t.scalar_type(), at::kBFloat16);
  EXPECT_FLOAT_EQ(x_t[0][0][0][0].item<float>(),
                  at::tensor(-0.002f).to(at::kBFloat16).item<float>());
}

TEST(NoisedLatents, RefusesShapesThatDisagree) {
  const auto latents = at::zeros({2, 16, 2, 2});
  EXPECT_THROW(noised_latents(latents, at::zeros({2, 16, 2, 4}), at::zeros({2})),
               std::invalid_argument);
  EXPECT_THROW(noised_latents(latents, latents, at::zeros({3})), std::invalid_argument);
  EXPECT_THROW(velocity_target(latents, at::zeros({1, 16, 2, 2})), std::invalid_argument);
}

TEST(EulerStep, FollowsTheVelocityFromNoiseToLatents) {
  const auto latents = at::randn({1, 16, 4, 4}), noise = at::randn({1, 16, 4, 4});
  auto x = noise;
  for (const auto& [now, next] : {std::pair{1.0, 0.7}, {0.7, 0.2}, {0.2, 0.0}}) {
    x = euler_step(x, velocity_target(latents, noise), now, next);
  }
  EXPECT_LT((x - latents).abs().max().item<float>(), 2e-6f);
}

}  // namespace
}  // namespace flux
