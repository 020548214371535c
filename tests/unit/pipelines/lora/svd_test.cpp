#include "pipelines/lora/svd.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/golden.h"

namespace flux::lora_tools {
namespace {

/// [out, in] with these singular values.
at::Tensor matrix_of(int64_t out, int64_t in, const std::vector<double>& s) {
  const auto n = static_cast<int64_t>(s.size());
  const auto u = std::get<0>(at::linalg_qr(at::randn({out, n}, at::kDouble))),
             v = std::get<0>(at::linalg_qr(at::randn({in, n}, at::kDouble)));
  return at::mm(u * at::tensor(s, at::kDouble), v.t());
}

at::Tensor product(const lora::Module& m) {
  return at::mm(m.up.to(at::kDouble), m.down.to(at::kDouble)) * m.scale();
}

TEST(SvdOfProduct, IsThatOfTheProduct) {
  for (const int64_t rank : {3, 40}) {  // below and above the smaller side
    const auto up = at::randn({50, rank}), down = at::randn({rank, 30});
    const auto svd = svd_of_product(up, down, 0.5);
    const auto wanted = at::mm(up.to(at::kDouble), down.to(at::kDouble)) * 0.5;
    EXPECT_LT(test::relative_error(at::mm(svd.u * svd.s, svd.v), wanted), 1e-12);
    EXPECT_NEAR(svd.square_norm, wanted.square().sum().item<double>(), 1e-9 * svd.square_norm);
    const int64_t half = std::min<int64_t>(rank, 30) / 2 + 1;
    const auto best = std::get<1>(at::linalg_svd(wanted, false));
    const double left = best.narrow(0, half, best.numel() - half).norm().item<double>();
    EXPECT_NEAR((product(pair_of(svd, half, "x")) - wanted).norm().item<double>(),
                left,
                1e-5 * wanted.norm().item<double>());
    EXPECT_NEAR(relative_error(svd, half), left / wanted.norm().item<double>(), 1e-6);
  }
}

TEST(LargestSingularValues, AreFoundInLargeMatrices) {
  at::manual_seed(1);
  std::vector<double> s{9, 7, 5, 3, 2};
  for (int i = 0; i < 200; ++i) s.push_back(0.5);  // a floor, as rounding makes it
  const auto matrix = matrix_of(900, 1000, s).to(at::kFloat);
  const auto svd = largest_singular_values(matrix, 5, "layer");
  for (int64_t i = 0; i < 5; ++i)
    EXPECT_NEAR(svd.s[i].item<double>(), s[static_cast<size_t>(i)], 2e-4) << i;
  const double left = 0.5 * std::sqrt(200);
  EXPECT_NEAR(
      (product(pair_of(svd, 5, "x")) - matrix.to(at::kDouble)).norm().item<double>(), left, 1e-3);
  EXPECT_NEAR(relative_error(svd, 5), left / matrix.norm().item<double>(), 1e-4);
  // the same on every run, and others for another layer
  const auto again = largest_singular_values(matrix, 5, "layer");
  EXPECT_TRUE(at::equal(again.u, svd.u) && at::equal(again.v, svd.v));
}

TEST(RankRule, ChoosesTheFewest) {
  const auto svd_with = [](const std::vector<double>& s) {
    Svd svd;
    svd.s = at::tensor(s, at::kDouble);
    svd.square_norm = svd.s.square().sum().item<double>();
    return svd;
  };
  const auto svd = svd_with({8, 4, 2, 1});
  EXPECT_EQ(choose_rank(RankRule{.rank = 3}, svd), 3);
  EXPECT_EQ(choose_rank(RankRule{.rank = 9}, svd), 4);
  EXPECT_EQ(choose_rank(RankRule{.sv_ratio = 4}, svd), 2);  // above 2
  EXPECT_EQ(choose_rank(RankRule{.sv_ratio = 1}, svd), 1);
  EXPECT_EQ(choose_rank(RankRule{.sv_cumulative = 0.8}, svd), 2);  // 12 of 15
  EXPECT_EQ(choose_rank(RankRule{.sv_cumulative = 0.81}, svd), 3);
  // sqrt(64 / 85) = 0.868, sqrt(80 / 85) = 0.970
  EXPECT_EQ(choose_rank(RankRule{.sv_frobenius = 0.86}, svd), 1);
  EXPECT_EQ(choose_rank(RankRule{.sv_frobenius = 0.88}, svd), 2);
  EXPECT_EQ(choose_rank(RankRule{.rank = 2, .sv_frobenius = 1}, svd), 2);
}

TEST(DeltaNorm, IsTheFrobeniusNorm) {
  const lora::Module pair{"x", at::randn({4, 30}), at::randn({50, 4}), 2};
  EXPECT_NEAR(delta_norm(pair), product(pair).norm().item<double>(), 1e-5);
  lora::Module lokr{"x", at::randn({2, 10}), at::randn({5, 2}), 1};
  lokr.mix = at::randn({3, 4});
  EXPECT_NEAR(delta_norm(lokr), product(lora::without_lokr(lokr)).norm().item<double>(), 1e-4);
}

TEST(Reduce, KeepsBitsWhereThereIsNothingToDo) {
  lora::Module module{"x", at::randn({4, 30}), at::randn({50, 4}), 2};
  const lora::Module before = module;
  double error = 0;
  reduce(module, {.rank = 4}, error);
  EXPECT_TRUE(module.up.is_same(before.up));
  EXPECT_EQ(error, 0);
  module.magnitude = at::rand({50, 1});
  reduce(module, {.rank = 2}, error);
  EXPECT_EQ(module.rank(), 2);
  EXPECT_GT(error, 0);
  EXPECT_TRUE(module.magnitude.defined());
}

}  // namespace
}  // namespace flux::lora_tools
