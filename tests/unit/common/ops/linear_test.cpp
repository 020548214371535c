#include "common/ops/linear.h"

#include <ATen/ATen.h>
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

/// x down^T up^T with the ups one by one: the product itself, as the layer sees it.
at::Tensor low_rank_values(const AdapterDropout& dropout,
                           const at::Tensor& x,
                           uint64_t module = 7) {
  const int64_t rank = 8, in = x.size(-1);
  const Linear layer{
      at::zeros({rank, in}), {}, {at::ones({rank, in}), at::eye(rank), 1, &dropout, module}};
  return linear(layer, x);
}

TEST(AdapterDropout, LeavesOutTheShareAndGrowsTheRest) {
  const at::Tensor x = at::ones({5, 400, 1});
  const auto values = low_rank_values({.values = 0.3, .seed = 1}, x);
  EXPECT_NEAR(values.eq(0).to(at::kFloat).mean().item<double>(), 0.3, 0.02);
  EXPECT_TRUE(values.masked_select(values.ne(0)).allclose(at::full({}, 1 / 0.7)));
  // a rank is there for all tokens of a sample or for none
  const auto ranks = low_rank_values({.ranks = 0.4, .seed = 1}, at::ones({500, 3, 1}));
  EXPECT_TRUE(at::equal(ranks.select(1, 0), ranks.select(1, 2)));
  EXPECT_FALSE(at::equal(ranks[0], ranks[1]));
  EXPECT_NEAR(ranks.eq(0).to(at::kFloat).mean().item<double>(), 0.4, 0.03);
  EXPECT_TRUE(ranks.masked_select(ranks.ne(0)).allclose(at::full({}, 1 / 0.6)));
  int64_t left_out = 0;
  for (uint64_t pass = 0; pass < 400; ++pass) {
    const auto y = low_rank_values({.modules = 0.25, .seed = 1, .pass = pass}, at::ones({2, 1}));
    const double sum = y.sum().item<double>();
    EXPECT_TRUE(sum == 0 || sum == 16) << sum;
    left_out += sum == 0;
  }
  EXPECT_NEAR(static_cast<double>(left_out) / 400, 0.25, 0.07);
}

TEST(AdapterDropout, IsKeyedBySeedPassAndModule) {
  const at::Tensor x = at::ones({2, 40, 1});
  const AdapterDropout dropout{.values = 0.5, .ranks = 0.2, .seed = 1, .pass = 3};
  const auto values = low_rank_values(dropout, x);
  EXPECT_TRUE(at::equal(low_rank_values(dropout, x), values));
  AdapterDropout other = dropout;
  other.pass = 4;
  EXPECT_FALSE(at::equal(low_rank_values(other, x), values));
  other = dropout;
  other.seed = 2;
  EXPECT_FALSE(at::equal(low_rank_values(other, x), values));
  EXPECT_FALSE(at::equal(low_rank_values(dropout, x, 8), values));
}

TEST(AdapterDropout, GradientsAreThoseOfWhatIsLeft) {
  AdapterDropout dropout{.values = 0.4, .ranks = 0.3, .seed = 5, .pass = 2};
  auto t = make(at::kFloat);
  Linear adapted = layer(t);
  adapted.lora.dropout = &dropout;
  adapted.lora.module = 7;
  // the mask, through a layer whose product is one everywhere
  const Linear probe{
      at::zeros({4, 20}), {}, {at::full({4, 20}, 0.05), at::eye(4), 1, &dropout, 7}};
  const at::Tensor mask = linear(probe, at::ones({2, 7, 20}));
  EXPECT_GT(mask.eq(0).sum().item<int64_t>(), 0);
  const auto out = linear(adapted, t.x);
  dropout.pass = 3;  // the backward comes later
  (out * t.w).sum().backward();
  Tensors d;
  const auto wide = [](const at::Tensor& v) { return v.detach().to(at::kDouble).requires_grad_(); };
  d = {wide(t.x), wide(t.weight), wide(t.bias), wide(t.down), wide(t.up), t.w.to(at::kDouble)};
  const auto inner = d.x.matmul(d.down.t()) * mask.to(at::kDouble);
  const auto expected = d.x.matmul(d.weight.t()) + d.bias + 0.75 * inner.matmul(d.up.t());
  (expected * d.w).sum().backward();
  EXPECT_LT(test::relative_error(out, expected), 1e-6);
  EXPECT_LT(test::relative_error(t.x.grad(), d.x.grad()), 1e-6);
  EXPECT_LT(test::relative_error(t.down.grad(), d.down.grad()), 1e-6);
  EXPECT_LT(test::relative_error(t.up.grad(), d.up.grad()), 1e-6);
}

}  // namespace
}  // namespace flux
