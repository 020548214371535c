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

TEST(AdapterDropout, IsTheSameHoweverAnUpdateIsCut) {
  const at::Tensor x = at::ones({4, 40, 1});
  AdapterDropout dropout{.values = 0.5, .ranks = 0.2, .modules = 0.5, .seed = 1, .pass = 3};
  for (dropout.pass = 1; dropout.pass < 8; ++dropout.pass) {
    dropout.sample = 0;
    const auto whole = low_rank_values(dropout, x),
               first = low_rank_values(dropout, x.narrow(0, 0, 1));
    dropout.sample = 1;
    const auto rest = low_rank_values(dropout, x.narrow(0, 1, 3));
    EXPECT_TRUE(at::equal(at::cat({first, rest}), whole));
    EXPECT_TRUE(!whole.any().item<bool>() || !at::equal(whole[0], whole[1]));
  }
}

TEST(AdapterDropout, GradientsAreThoseOfWhatIsLeft) {
  AdapterDropout dropout{.values = 0.4, .ranks = 0.3, .seed = 5, .pass = 2};
  auto t = make(at::kFloat);
  Linear adapted = layer(t);
  adapted.lora.dropout = &dropout;
  adapted.lora.module = 7;
  // the mask, through a layer whose product is one everywhere
  const Linear probe{at::zeros({4, 20}), {}, {at::full({4, 20}, 0.05), at::eye(4), 1, &dropout, 7}};
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

/// The weight of an adapted layer by the plain formula; the norm is a constant for gradients.
at::Tensor adapted_weight(const at::Tensor& weight, const LowRank& a) {
  const at::Tensor inner = a.up.defined() ? a.up.matmul(a.down) : a.down;
  at::Tensor w = weight + a.scale * (a.mix.defined() ? at::kron(a.mix, inner) : inner);
  if (a.magnitude.defined()) w = w * (a.magnitude / w.detach().norm(2, {1}, true));
  return w;
}

struct AdapterCase {
  const char* name;
  LowRank adapter;
};

/// LoRA and LoKr with a large matrix of rank 3 and a whole one, each with and without magnitudes, for a weight [12, 20].
std::vector<AdapterCase> adapter_cases() {
  at::manual_seed(11);
  const auto leaf = [](at::IntArrayRef shape) { return at::randn(shape).requires_grad_(); };
  std::vector<AdapterCase> out;
  for (const bool dora : {false, true}) {
    LowRank lora{leaf({4, 20}), leaf({12, 4}), 0.75};
    LowRank lokr{.down = leaf({3, 10}), .up = leaf({4, 3}), .scale = 1.5, .mix = leaf({3, 2})};
    LowRank whole{.down = leaf({6, 5}), .up = at::Tensor(), .scale = 1, .mix = leaf({2, 4})};
    if (dora)
      for (LowRank* a : {&lora, &lokr, &whole})
        a->magnitude = (at::rand({12, 1}) + 3).requires_grad_();
    if (dora) out.push_back({"dora", lora});
    out.push_back({dora ? "lokr, dora" : "lokr", lokr});
    out.push_back({dora ? "whole lokr, dora" : "whole lokr", whole});
  }
  return out;
}

TEST(Adapters, EqualThePlainFormulaAndItsGradients) {
  for (auto [name, adapter] : adapter_cases()) {
    for (const bool with_bias : {true, false}) {
      SCOPED_TRACE(testing::Message() << name << (with_bias ? "" : " without bias"));
      auto t = make(at::kFloat);
      if (!with_bias) t.bias = at::Tensor();
      for (at::Tensor* part : adapter.parts())
        if (part->defined()) part->mutable_grad() = at::Tensor();
      const auto wide = [](const at::Tensor& v) {
        return v.defined() ? v.detach().to(at::kDouble).requires_grad_() : v;
      };
      LowRank a = adapter;
      for (at::Tensor* part : a.parts()) *part = wide(*part);
      const Tensors d{wide(t.x), wide(t.weight), wide(t.bias), {}, {}, t.w.to(at::kDouble)};
      auto expected = d.x.matmul(adapted_weight(d.weight, a).t());
      if (with_bias) expected = expected + d.bias;
      (expected * d.w).sum().backward();
      const auto got = linear({t.weight, t.bias, adapter}, t.x);
      (got * t.w).sum().backward();
      EXPECT_LT(test::relative_error(got, expected), 1e-6);
      EXPECT_LT(test::relative_error(t.x.grad(), d.x.grad()), 1e-6);
      if (with_bias) {
        EXPECT_LT(test::relative_error(t.bias.grad(), d.bias.grad()), 1e-6);
      }
      for (size_t i = 0; i < kAdapterParts.size(); ++i)
        if (adapter.parts()[i]->defined()) {
          EXPECT_LT(test::relative_error(adapter.parts()[i]->grad(), a.parts()[i]->grad()), 2e-6)
              << kAdapterParts[i];
        }
    }
  }
}

TEST(Adapters, AreFloat32BesideABfloat16LayerAndAQuantisedOne) {
  for (auto [name, adapter] : adapter_cases()) {
    SCOPED_TRACE(name);
    auto t = make(at::kBFloat16);
    const auto weight = t.weight.detach();
    const auto out = linear({weight, t.bias.detach(), adapter}, t.x);
    EXPECT_EQ(out.scalar_type(), at::kBFloat16);
    (out * t.w).sum().backward();
    for (const at::Tensor* part : adapter.parts())
      if (part->defined()) {
        EXPECT_EQ(part->grad().scalar_type(), at::kFloat);
      }
    LowRank a = adapter;
    for (at::Tensor* part : a.parts())
      if (part->defined()) *part = part->detach().to(at::kDouble);
    const auto expected =
        t.x.detach().to(at::kDouble).matmul(adapted_weight(weight.to(at::kDouble), a).t()) +
        t.bias.detach().to(at::kDouble);
    EXPECT_LT(test::relative_error(out, expected), 0.01);
    const auto codes = quantize(weight, QuantFormat::kFp8);
    const auto plain = dequantize(codes, at::kBFloat16);
    Linear quantised{{}, t.bias.detach(), adapter, codes};
    EXPECT_TRUE(at::equal(linear(quantised, t.x), linear({plain, t.bias.detach(), adapter}, t.x)));
  }
}

TEST(Adapters, ChangeNoBitAtTheStart) {
  for (const auto type : {at::kFloat, at::kBFloat16})
    for (auto [name, adapter] : adapter_cases()) {
      SCOPED_TRACE(name);
      const at::NoGradGuard no_grad;
      const auto t = make(type);
      (adapter.up.defined() ? adapter.up : adapter.down).zero_();
      Linear adapted{t.weight, t.bias, adapter};
      if (adapter.magnitude.defined())
        adapted.lora.magnitude.copy_(row_norms(adapted, type).view({-1, 1}));
      EXPECT_TRUE(at::equal(linear(adapted, t.x), linear({t.weight, t.bias, {}}, t.x)));
    }
}

TEST(Adapters, RowNormsComeInParts) {
  // 4 Mi elements a part: two of them
  const at::Tensor weight = at::randn({600, 8000}), down = at::randn({2, 8000}),
                   up = at::randn({600, 2});
  const auto norms = row_norms({weight, {}, {down, up, 0.5}}, at::kFloat);
  const auto expected =
      (weight.to(at::kDouble) + 0.5 * up.to(at::kDouble).mm(down.to(at::kDouble))).norm(2, {1});
  EXPECT_LT(test::relative_error(norms, expected), 1e-6);
}

TEST(Adapters, NameWhatDoesNotFit) {
  const auto t = make(at::kFloat);
  for (auto [name, adapter] : adapter_cases()) {
    LowRank wrong = adapter;
    if (wrong.mix.defined())
      wrong.mix = at::zeros({5, 2});
    else
      wrong.magnitude = at::zeros({12});
    EXPECT_THROW(linear({t.weight, t.bias, wrong}, t.x), std::invalid_argument) << name;
  }
}

}  // namespace
}  // namespace flux
