#include "common/ops/linear.h"

#include <gtest/gtest.h>

#include "tests/support/golden.h"

namespace flux {
namespace {

struct Tensors {
  at::Tensor x, weight, bias, down, up, w;
};

Tensors make(at::ScalarType type) {
  at::manual_seed(3);
  const auto leaf = [&](at::IntArrayRef shape) {
    return at::randn(shape).to(type).requires_grad_();
  };
  return {leaf({2, 7, 20}),
          leaf({12, 20}),
          leaf({12}),
          leaf({4, 20}),
          leaf({12, 4}),
          at::randn({2, 7, 12}).to(type)};
}

Linear layer(const Tensors& t) { return {t.weight, t.bias, {t.down, t.up, 0.75}}; }

TEST(Linear, EqualsTheSumOfProductsAndItsGradients) {
  const auto t = make(at::kFloat);
  (linear(layer(t), t.x) * t.w).sum().backward();
  Tensors d;
  const auto wide = [](const at::Tensor& v) { return v.detach().to(at::kDouble).requires_grad_(); };
  d = {wide(t.x), wide(t.weight), wide(t.bias), wide(t.down), wide(t.up), t.w.to(at::kDouble)};
  const auto out = d.x.matmul((d.weight + 0.75 * d.up.matmul(d.down)).t()) + d.bias;
  (out * d.w).sum().backward();
  EXPECT_LT(test::relative_error(linear(layer(t), t.x), out), 5e-7);
  EXPECT_LT(test::relative_error(t.x.grad(), d.x.grad()), 5e-7);
  EXPECT_LT(test::relative_error(t.weight.grad(), d.weight.grad()), 5e-7);
  EXPECT_LT(test::relative_error(t.bias.grad(), d.bias.grad()), 5e-7);
  EXPECT_LT(test::relative_error(t.down.grad(), d.down.grad()), 5e-7);
  EXPECT_LT(test::relative_error(t.up.grad(), d.up.grad()), 5e-7);
}

TEST(Linear, AZeroUpChangesNoBit) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const auto t = make(type);
    const auto down = at::randn({4, 20}), up = at::zeros({12, 4});
    EXPECT_TRUE(at::equal(linear({t.weight, t.bias, {down, up, 2}}, t.x),
                          linear({t.weight, t.bias, {}}, t.x)));
  }
}

TEST(Linear, AFloat32AdapterOnABfloat16LayerGetsFloat32Gradients) {
  auto t = make(at::kBFloat16);
  t.weight.requires_grad_(false);
  t.bias.requires_grad_(false);
  t.down = at::randn({4, 20}).requires_grad_();
  t.up = at::randn({12, 4}).requires_grad_();
  const auto out = linear(layer(t), t.x);
  EXPECT_EQ(out.scalar_type(), at::kBFloat16);
  (out * t.w).sum().backward();
  EXPECT_EQ(t.down.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(t.up.grad().scalar_type(), at::kFloat);
  EXPECT_FALSE(t.weight.grad().defined());
  EXPECT_FALSE(t.bias.grad().defined());
  const auto rows = t.x.detach().to(at::kDouble).view({14, 20});
  const auto grad = t.w.to(at::kDouble).view({14, 12});
  const auto expected = 0.75 * grad.matmul(t.up.detach().to(at::kDouble)).t().matmul(rows);
  EXPECT_LT(test::relative_error(t.down.grad(), expected), 0.01);
}

TEST(Linear, WorksWithoutABias) {
  const auto t = make(at::kFloat);
  EXPECT_LT(test::relative_error(linear({t.weight, {}, {}}, t.x), t.x.matmul(t.weight.t())), 1e-6);
}

TEST(Linear, NamesWhatDoesNotFit) {
  const auto t = make(at::kFloat);
  EXPECT_THROW(linear(layer(t), at::zeros({3, 21})), std::invalid_argument);
  EXPECT_THROW(linear(layer(t), t.x.to(at::kBFloat16)), std::invalid_argument);
  EXPECT_THROW(linear({t.weight, t.bias, {t.down, t.up.narrow(1, 0, 3), 1}}, t.x),
               std::invalid_argument);
}

}  // namespace
}  // namespace flux
