#include "common/ops/product.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "common/ops/gelu.h"
#include "tests/support/golden.h"

namespace flux {
namespace {

// Sizes around the kernels' blocks, odd ones, both layouts, with and without a second product and a bias.
TEST(Product, EqualsFloat64WhateverTheLayout) {
  at::manual_seed(5);
  for (const auto type : {at::kFloat, at::kBFloat16})
    for (int64_t i = 0; i < 48; ++i) {
      const int64_t m = 1 + i * 37 % 90, k = 1 + i * 53 % (i % 6 ? 70 : 1700),
                    n = 1 + i * 71 % (i % 4 ? 60 : 300), r = 1 + i % 7;
      SCOPED_TRACE(testing::Message() << type << " " << m << " " << k << " " << n << " " << r);
      const auto matrix = [&](int64_t rows, int64_t columns, bool turned) {
        return turned ? at::randn({columns, rows}).to(type).t()
                      : at::randn({rows, columns}).to(type);
      };
      Product p{.a = matrix(m, k, i & 1), .b = matrix(k, n, i & 2), .scale = i % 5 ? 1 : 0.5};
      const auto wide = [](const at::Tensor& x) { return x.to(at::kDouble); };
      auto expected = wide(p.a).mm(wide(p.b)) * p.scale;
      if (i & 4) {
        p.c = matrix(m, r, false);
        p.d = matrix(r, n, i & 8);
        expected = expected + wide(p.c).mm(wide(p.d));
      }
      if (i & 16) {
        p.bias = at::randn({n}).to(type);
        expected = expected + wide(p.bias);
      }
      const auto out = at::empty({m, n}, p.a.options());
      multiply(p, out);
      EXPECT_LT(test::relative_error(out, expected), type == at::kFloat ? 2e-6 : 4e-3);
    }
}

TEST(Gelu, AndItsGradientEqualFloat64AlsoWrittenBehindAnother) {
  at::manual_seed(6);
  const auto x = (at::randn({2, 5, 37}) * 4).requires_grad_(),
             left = at::randn({2, 5, 3}).requires_grad_();
  const auto w = at::randn({2, 5, 40});
  const auto out = concat_gelu(left, x);
  (out * w).sum().backward();
  const auto wide_x = x.detach().to(at::kDouble).requires_grad_(),
             wide_left = left.detach().to(at::kDouble).requires_grad_();
  const auto expected = at::cat({wide_left, at::gelu(wide_x, "tanh")}, 2);
  (expected * w).sum().backward();
  EXPECT_LT(test::relative_error(out, expected), 5e-7);
  EXPECT_LT(test::relative_error(x.grad(), wide_x.grad()), 1e-6);
  EXPECT_LT(test::relative_error(left.grad(), wide_left.grad()), 1e-7);
  EXPECT_TRUE(at::equal(gelu_tanh(x), out.narrow(2, 3, 37)));
}

}  // namespace
}  // namespace flux
