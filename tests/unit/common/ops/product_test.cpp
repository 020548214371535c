#include "common/ops/product.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "common/ops/gelu.h"
#include "common/ops/product_cpu.h"
#include "common/tensor/memory.h"
#include "tests/support/golden.h"

namespace flux {
namespace {

// Sizes around the kernels' blocks, odd ones, both layouts, with and without a second product and a bias.
void compare_with_float64() {
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

TEST(Product, EqualsFloat64WhateverTheLayout) { compare_with_float64(); }

/// The kernel of CPUs without bfloat16.
class ProductAsFloat : public testing::Test {
 protected:
  void SetUp() override { kernel::limit_bf16_kernel(true); }
  void TearDown() override { kernel::limit_bf16_kernel(false); }
};

TEST_F(ProductAsFloat, EqualsFloat64WhateverTheLayout) {
  ASSERT_EQ(kernel::bf16_kernel(), kernel::Bf16Kernel::kFloat);
  compare_with_float64();
}

TEST_F(ProductAsFloat, AllocatesTheScratchThatIsPlannedAndNoMore) {
  count_tensor_memory();
  const auto a = at::randn({130, 300}).to(at::kBFloat16),
             b = at::randn({300, 70}).to(at::kBFloat16);
  for (const bool turned : {false, true}) {
    const Product p{.a = turned ? b.t() : a, .b = turned ? a.t() : b};
    const auto out = at::empty({p.a.size(0), p.b.size(1)}, a.options());
    reset_cpu_peak();
    const int64_t before = cpu_memory().live;
    multiply(p, out);
    EXPECT_EQ(cpu_memory().peak - before,
              product_scratch_bytes(
                  p.a.size(0), 300, p.b.size(1), at::kBFloat16, turned, at::get_num_threads()));
  }
}

// Rows are cut by the number of threads.
TEST_F(ProductAsFloat, HasTheSameBitsOnAnyNumberOfThreads) {
  at::manual_seed(7);
  const auto a = at::randn({333, 500}).to(at::kBFloat16),
             b = at::randn({500, 40}).to(at::kBFloat16);
  const int before = at::get_num_threads();
  std::vector<at::Tensor> outs;
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    outs.push_back(at::empty({333, 40}, a.options()));
    multiply({.a = a, .b = b}, outs.back());
  }
  at::set_num_threads(before);
  EXPECT_TRUE(at::equal(outs[0], outs[1]));
  EXPECT_TRUE(at::equal(outs[0], outs[2]));
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
