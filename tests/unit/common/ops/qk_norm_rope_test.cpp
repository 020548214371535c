#include "common/ops/qk_norm_rope.h"

#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

#include "tests/support/golden.h"

namespace flux {
namespace {

struct Case {
  at::Tensor qkv, query_scale, key_scale, cos, sin;
};

Case make_case(
    int64_t batch, int64_t tokens, int64_t heads, int64_t head, int64_t rope_batch, uint64_t seed) {
  const auto gen = at::make_generator<at::CPUGeneratorImpl>(seed);
  const auto angles = at::rand({rope_batch, tokens, head / 2}, gen) * 7;
  return {at::randn({batch, tokens, 3 * heads * head}, gen),
          at::randn({head}, gen) + 1,
          at::randn({head}, gen) + 1,
          angles.cos(),
          angles.sin()};
}

at::Tensor rotated_norm(const at::Tensor& x,
                        const at::Tensor& scale,
                        const at::Tensor& cos,
                        const at::Tensor& sin) {
  const auto normed = x * (x.pow(2).mean(-1, true) + 1e-6).rsqrt() * scale;
  const auto pairs = normed.unflatten(-1, at::IntArrayRef{-1, 2});
  const auto a = pairs.select(-1, 0), b = pairs.select(-1, 1), c = cos.unsqueeze(2),
             s = sin.unsqueeze(2);
  return at::stack({c * a - s * b, s * a + c * b}, -1).flatten(-2);
}

/// The same by LibTorch's own operations.
Qkv plain(const Case& c) {
  const auto parts = c.qkv.unflatten(-1, at::IntArrayRef{3, -1, c.query_scale.size(0)});
  return {rotated_norm(parts.select(2, 0), c.query_scale, c.cos, c.sin),
          rotated_norm(parts.select(2, 1), c.key_scale, c.cos, c.sin),
          parts.select(2, 2)};
}

Qkv run(const Case& c) { return qk_norm_rope(c.qkv, c.query_scale, c.key_scale, c.cos, c.sin); }

/// A scalar that weighs every element of the result differently.
at::Tensor weighed(const Qkv& out, const at::Tensor& w) {
  return (out.q * w).sum() + (out.k * w.flip(1)).sum() + (out.v * w.flip(0)).sum();
}

Case leaves(const Case& c, at::ScalarType type) {
  const auto leaf = [&](const at::Tensor& t) { return t.detach().to(type).requires_grad_(); };
  return {leaf(c.qkv), leaf(c.query_scale), leaf(c.key_scale), c.cos.to(type), c.sin.to(type)};
}

TEST(QkNormRope, EqualsSeparateOperationsAndTheirGradientsInFloat64) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const auto c = make_case(
        2, 5 + static_cast<int64_t>(seed) * 37, 3, seed % 2 ? 128 : 20, seed % 3 ? 1 : 2, seed);
    const auto fast = leaves(c, at::kFloat), exact = leaves(c, at::kDouble);
    const auto out = run(fast), expected = plain(exact);
    EXPECT_LT(test::relative_error(out.q, expected.q), 3e-7);
    EXPECT_LT(test::relative_error(out.k, expected.k), 3e-7);
    EXPECT_TRUE(at::equal(out.v, expected.v.to(at::kFloat)));
    const auto w = at::randn(out.q.sizes(), at::make_generator<at::CPUGeneratorImpl>(seed + 100));
    weighed(out, w).backward();
    weighed(expected, w.to(at::kDouble)).backward();
    EXPECT_LT(test::relative_error(fast.qkv.grad(), exact.qkv.grad()), 5e-7);
    EXPECT_LT(test::relative_error(fast.query_scale.grad(), exact.query_scale.grad()), 5e-6);
    EXPECT_LT(test::relative_error(fast.key_scale.grad(), exact.key_scale.grad()), 5e-6);
  }
}

TEST(QkNormRope, Bfloat16IsTheRoundedFloat32Result) {
  auto c = make_case(1, 33, 2, 128, 1, 7);
  c.qkv = c.qkv.to(at::kBFloat16);
  auto wide = c;
  wide.qkv = c.qkv.to(at::kFloat);
  const auto out = run(c), expected = run(wide);
  EXPECT_EQ(out.q.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(out.q, expected.q.to(at::kBFloat16)));
  EXPECT_TRUE(at::equal(out.k, expected.k.to(at::kBFloat16)));
  EXPECT_TRUE(at::equal(out.v, c.qkv.narrow(2, 512, 256).view({1, 33, 2, 128})));
}

TEST(QkNormRope, Bfloat16GradientsHaveTheDtypesOfTheirTensors) {
  const auto c = make_case(2, 9, 2, 32, 1, 8);
  auto narrow = leaves(c, at::kFloat);
  narrow.qkv = c.qkv.to(at::kBFloat16).requires_grad_();
  narrow.query_scale = c.query_scale.to(at::kBFloat16).requires_grad_();
  const auto exact = leaves(c, at::kDouble);
  const auto w = at::randn({2, 9, 2, 32});
  weighed(run(narrow), w.to(at::kBFloat16)).backward();
  weighed(plain(exact), w.to(at::kDouble)).backward();
  EXPECT_EQ(narrow.query_scale.grad().scalar_type(), at::kBFloat16);
  EXPECT_EQ(narrow.key_scale.grad().scalar_type(), at::kFloat);
  EXPECT_LT(test::relative_error(narrow.qkv.grad(), exact.qkv.grad()), 0.01);
  EXPECT_LT(test::relative_error(narrow.query_scale.grad(), exact.query_scale.grad()), 0.01);
}

TEST(QkNormRope, TakesASliceOfAWiderLayer) {
  const auto c = make_case(2, 6, 2, 32, 1, 9);
  auto slice = c;
  slice.qkv = at::cat({c.qkv, at::full({2, 6, 40}, 1e30f)}, 2).narrow(2, 0, 192);
  ASSERT_FALSE(slice.qkv.is_contiguous());
  EXPECT_TRUE(at::equal(run(slice).q, run(c).q));
  EXPECT_TRUE(at::equal(run(slice).v, run(c).v));
}

TEST(QkNormRope, ScalesWithoutGradientGetNone) {
  auto c = leaves(make_case(1, 4, 1, 8, 1, 10), at::kFloat);
  c.key_scale.requires_grad_(false);
  c.query_scale.requires_grad_(false);
  weighed(run(c), at::randn({1, 4, 1, 8})).backward();
  EXPECT_TRUE(c.qkv.grad().defined());
  EXPECT_FALSE(c.query_scale.grad().defined());
}

TEST(QkNormRope, OnMetaMakesShapesForwardAndBackward) {
  const auto c = make_case(2, 5, 3, 16, 1, 11);
  const auto meta = [](const at::Tensor& t) {
    return t.to(at::kMeta).requires_grad_(t.dim() == 1);
  };
  const auto qkv = meta(c.qkv).requires_grad_();
  const auto scale = meta(c.query_scale);
  const auto out = qk_norm_rope(qkv, scale, meta(c.key_scale), meta(c.cos), meta(c.sin));
  EXPECT_EQ(out.k.sizes(), (at::IntArrayRef{2, 5, 3, 16}));
  out.q.sum().backward();
  EXPECT_EQ(qkv.grad().sizes(), qkv.sizes());
  EXPECT_EQ(scale.grad().sizes(), scale.sizes());
}

TEST(QkNormRope, NamesWhatDoesNotFit) {
  auto c = make_case(2, 5, 3, 16, 1, 12);
  c.cos = c.cos.narrow(1, 0, 4);
  try {
    run(c);
    FAIL() << "accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("rope_cos [1, 4, 8]"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace flux
