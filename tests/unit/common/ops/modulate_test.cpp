#include "common/ops/modulate.h"

#include <gtest/gtest.h>

#include "tests/support/golden.h"

namespace flux {
namespace {

TEST(Modulate, WorkedByHand) {
  const auto x = at::tensor({1.0f, 3.0f}).view({1, 1, 2});  // normalised: -1, 1
  const auto out = modulate(
      x, at::tensor({10.0f, 20.0f}).view({1, 1, 2}), at::tensor({1.0f, 2.0f}).view({1, 1, 2}), 0);
  EXPECT_FLOAT_EQ(out[0][0][0].item<float>(), 8);
  EXPECT_FLOAT_EQ(out[0][0][1].item<float>(), 23);
}

TEST(GatedResidual, WorkedByHand) {
  const auto out = gated_residual(
      at::full({1, 2, 1}, 5.0f), at::full({1, 1, 1}, -2.0f), at::full({1, 2, 1}, 3.0f));
  EXPECT_FLOAT_EQ(out[0][1][0].item<float>(), -1);
}

TEST(Modulate, OnMetaMakesShapesForwardAndBackward) {
  const auto x = at::empty({2, 5, 8}, at::kMeta).requires_grad_();
  const auto shift = at::empty({2, 1, 8}, at::kMeta).requires_grad_();
  modulate(x, shift, shift).sum().backward();
  EXPECT_EQ(x.grad().sizes(), x.sizes());
  EXPECT_EQ(shift.grad().sizes(), shift.sizes());
}

}  // namespace
}  // namespace flux
