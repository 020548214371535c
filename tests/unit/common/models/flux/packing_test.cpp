#include "common/models/flux/packing.h"

#include <gtest/gtest.h>

#include "tests/support/golden.h"

namespace flux::dit {
namespace {

TEST(PackLatents, WorkedByHand) {
  const auto latents = at::arange(2 * 4 * 6, at::kFloat).view({1, 2, 4, 6});
  const auto tokens = pack_latents(latents);
  ASSERT_EQ(tokens.sizes(), (at::IntArrayRef{1, 6, 8}));
  // token 4 = patch row 1, column 1; channel 7 = latent channel 1, lower right
  EXPECT_EQ(tokens[0][4][7].item<float>(), latents[0][1][3][3].item<float>());
  EXPECT_EQ(tokens[0][4][1].item<float>(), latents[0][0][2][3].item<float>());
}

TEST(PackLatents, UnpackIsTheInverse) {
  const auto latents = at::randn({2, 16, 6, 10});
  EXPECT_TRUE(at::equal(unpack_latents(pack_latents(latents), 6, 10), latents));
}

TEST(PackLatents, EqualsTheReference) {
  const auto vectors = test::golden("models/ops/vectors.safetensors");
  const auto& latents = vectors.at("pack.latents");
  EXPECT_TRUE(at::equal(pack_latents(latents), vectors.at("pack.tokens")));
  EXPECT_TRUE(at::equal(image_ids(latents.size(2), latents.size(3)), vectors.at("pack.img_ids")));
}

TEST(PackLatents, RefusesOddSides) {
  EXPECT_THROW(pack_latents(at::zeros({1, 16, 5, 4})), std::invalid_argument);
  EXPECT_THROW(unpack_latents(at::zeros({1, 6, 64}), 4, 4), std::invalid_argument);
}

TEST(TextIds, AreZero) {
  EXPECT_EQ(text_ids(7).sizes(), (at::IntArrayRef{7, 3}));
  EXPECT_EQ(text_ids(7).abs().max().item<float>(), 0);
}

}  // namespace
}  // namespace flux::dit
