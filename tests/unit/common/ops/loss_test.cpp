#include "common/ops/loss.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/support/golden.h"

namespace flux {
namespace {

constexpr LossType kTypes[] = {LossType::kL2, LossType::kL1, LossType::kHuber, LossType::kSmoothL1};

/// The formulas in double.
at::Tensor plain(LossType type,
                 const at::Tensor& d,
                 const at::Tensor& constants,
                 const at::Tensor& mask) {
  const at::Tensor c = constants.to(at::kDouble).view({-1, 1, 1});
  at::Tensor loss;
  if (type == LossType::kL2) loss = d.square();
  if (type == LossType::kL1) loss = d.abs();
  if (type == LossType::kHuber) loss = 2 * c * ((d.square() + c.square()).sqrt() - c);
  if (type == LossType::kSmoothL1) loss = 2 * ((d.square() + c.square()).sqrt() - c);
  if (mask.defined()) loss = loss * mask.to(at::kDouble);
  return loss.sum({1, 2});
}

TEST(Loss, EqualsTheFormulasInDoubleForwardAndBackward) {
  at::manual_seed(3);
  const at::Tensor c = at::tensor({0.1f, 3.0f}), weight = at::tensor({0.7, -2.0}, at::kDouble);
  for (const LossType type : kTypes) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      for (const int64_t width : {64, 5, 131}) {  // whole packs of 16, less than one, and some more
        for (const bool masked : {false, true}) {
          SCOPED_TRACE(testing::Message() << static_cast<int>(type) << ' ' << c10::toString(dtype)
                                          << ' ' << width << ' ' << masked);
          // a slice of a wider tensor, and more rows than a group
          const at::Tensor wide = at::randn({2, 37, width + 3}).to(dtype).requires_grad_(true);
          const at::Tensor target = at::randn({2, 37, width});
          const at::Tensor mask = masked ? at::rand({2, 37, width}) : at::Tensor();
          const at::Tensor sums = loss_sums(type,
                                            wide.narrow(2, 3, width),
                                            target,
                                            c,
                                            masked ? std::optional(mask) : std::nullopt);
          (sums * weight.to(at::kFloat)).sum().backward();
          const at::Tensor exact = wide.detach().to(at::kDouble).requires_grad_(true);
          const at::Tensor wanted =
              plain(type, exact.narrow(2, 3, width) - target.to(at::kDouble), c, mask);
          (wanted * weight).sum().backward();
          EXPECT_LE(test::relative_error(sums, wanted), 1e-6);
          EXPECT_LE(test::relative_error(wide.grad(), exact.grad()),
                    dtype == at::kFloat ? 3e-7 : 3e-3);
        }
      }
    }
  }
}

TEST(Loss, SmallDifferencesDoNotCancel) {
  const at::Tensor x = at::full({1, 1, 4}, 1e-5f), zero = at::zeros({1, 1, 4});
  const double sum = 4 * 2 * (std::sqrt(1e-10 + 1) - 1);
  EXPECT_NEAR(
      loss_sums(LossType::kSmoothL1, x, zero, at::ones({1}), {}).item<double>() / sum, 1, 1e-6);
}

TEST(Loss, WhatIsNotFiniteIsSeen) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const LossType type : kTypes)
    for (const float bad : {inf, -inf, std::nanf("")})
      EXPECT_FALSE(std::isfinite(loss_sums(type,
                                           at::tensor({1.0f, bad}).view({1, 1, 2}),
                                           at::zeros({1, 1, 2}),
                                           at::ones({1}),
                                           {})
                                     .item<double>()))
          << static_cast<int>(type) << ' ' << bad;
}

TEST(Loss, BitsDoNotDependOnTheNumberOfThreads) {
  at::manual_seed(4);
  const at::Tensor x = at::randn({3, 300, 64}), target = at::randn({3, 300, 64});
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const at::Tensor one = loss_sums(LossType::kHuber, x, target, at::ones({3}), {});
  at::set_num_threads(3);
  const at::Tensor three = loss_sums(LossType::kHuber, x, target, at::ones({3}), {});
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(one, three));
}

TEST(Loss, OtherShapesAreRefused) {
  const at::Tensor x = at::zeros({2, 3, 4}), c = at::ones({2});
  EXPECT_THROW(loss_sums(LossType::kL2, x, at::zeros({2, 3, 5}), c, {}), std::invalid_argument);
  EXPECT_THROW(loss_sums(LossType::kL2, x, x, at::ones({3}), {}), std::invalid_argument);
  EXPECT_THROW(loss_sums(LossType::kL2, x, x, c, at::zeros({2, 3, 1})), std::invalid_argument);
  EXPECT_THROW(loss_sums(LossType::kL2, x.to(at::kDouble), x, c, {}), std::invalid_argument);
}

}  // namespace
}  // namespace flux
