#include "common/train/loss.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/golden.h"

namespace flux {
namespace {

constexpr double kLimit = 3e-7;

const TensorMap& vectors() {
  static const TensorMap map = test::golden("models/timesteps/vectors.safetensors");
  return map;
}
const at::Tensor& vector(const std::string& name) { return vectors().at(name); }

TEST(LossWeights, EqualTheReference) {
  using enum WeightingScheme;
  for (const auto& [name, scheme] : {std::pair{"none", kNone},
                                     {"sigma_sqrt", kSigmaSqrt},
                                     {"cosmap", kCosmap},
                                     {"logit_normal", kLogitNormal},
                                     {"mode", kMode}}) {
    const at::Tensor got = loss_weights(scheme, vector("weighting.sigma"));
    EXPECT_LT(test::relative_error(got, vector(std::string("weighting.") + name)), kLimit) << name;
  }
}

TEST(LossPerSample, EqualsTheReferenceForEveryPredictionType) {
  using enum WeightingScheme;
  const std::vector<std::tuple<std::string, Prediction, WeightingScheme>> cases{
      {"raw.none", Prediction::kRaw, kNone},
      {"additive.none", Prediction::kAdditive, kNone},
      {"sigma_scaled.none", Prediction::kSigmaScaled, kNone},
      {"sigma_scaled.sigma_sqrt", Prediction::kSigmaScaled, kSigmaSqrt},
      {"sigma_scaled.cosmap", Prediction::kSigmaScaled, kCosmap}};
  const at::Tensor output = vector("prediction.output"), noisy = vector("prediction.noisy");
  const at::Tensor sigma = vector("prediction.sigma");
  for (const auto& [name, prediction, weighting] : cases) {
    SCOPED_TRACE(name);
    const std::string kind = name.substr(0, name.find('.'));
    EXPECT_LT(test::relative_error(model_prediction(prediction, output, noisy, sigma),
                                   vector("prediction." + kind)),
              kLimit);
    const at::Tensor loss = loss_per_sample({.prediction = prediction, .weighting = weighting},
                                            output,
                                            noisy,
                                            vector("prediction.target"),
                                            sigma,
                                            {});
    EXPECT_LT(test::relative_error(loss, vector("prediction." + name + ".loss_per_sample")),
              kLimit);
    EXPECT_LT(test::relative_error(loss.mean(), vector("prediction." + name + ".loss")), kLimit);
  }
}

TEST(ElementLoss, EqualsTheReferenceForEveryType) {
  const at::Tensor output = vector("prediction.output"), target = vector("prediction.target");
  const at::Tensor sigma = vector("prediction.sigma");
  const auto loss = [&](LossType type, HuberSchedule schedule = HuberSchedule::kConstant) {
    return element_loss({.type = type, .huber_schedule = schedule}, output, target, sigma, {});
  };
  EXPECT_LT(test::relative_error(loss(LossType::kL1).mean(), vector("loss.l1")), kLimit);
  EXPECT_LT(test::relative_error(loss(LossType::kL2).mean(), vector("loss.l2")), kLimit);
  for (const auto& [name, schedule] : {std::pair{"constant", HuberSchedule::kConstant},
                                       {"exponential", HuberSchedule::kExponential}}) {
    EXPECT_LT(test::relative_error(loss(LossType::kHuber, schedule),
                                   vector(fmt::format("loss.huber.{}.per_sample", name))),
              kLimit);
    EXPECT_LT(test::relative_error(loss(LossType::kSmoothL1, schedule),
                                   vector(fmt::format("loss.smooth_l1.{}.per_sample", name))),
              kLimit);
  }
}

TEST(ElementLoss, SnrScheduleFollowsNoiseOverSignal) {  // formula in double
  const at::Tensor sigma = at::tensor({0.0f, 0.3f, 1.0f}), d = at::full({3, 1, 2, 2}, 0.7f);
  const LossOptions options{.type = LossType::kHuber,
                            .huber_schedule = HuberSchedule::kSnr,
                            .huber_c = 0.2,
                            .huber_scale = 3};
  const at::Tensor got = element_loss(options, d, at::zeros_like(d), sigma, {});
  for (int64_t i = 0; i < 3; ++i) {
    const double s = sigma[i].item<double>();
    const double c = 3 * (s < 1 ? 0.8 / std::pow(1 + s / (1 - s), 2) + 0.2 : 0.2);
    const double wanted = 2 * c * (std::sqrt(0.7 * 0.7 + c * c) - c);
    EXPECT_NEAR(got[i].item<double>(), wanted, 1e-6) << s;
  }
}

TEST(ElementLoss, HuberScaleMultipliesEverySchedule) {
  const at::Tensor d = at::full({1, 4}, 0.7f), sigma = at::tensor({0.4f});
  using enum HuberSchedule;
  for (const auto& [schedule, c] :
       {std::pair{kConstant, 0.1}, {kExponential, std::pow(0.1, 0.4)}}) {
    const LossOptions options{
        .type = LossType::kSmoothL1, .huber_schedule = schedule, .huber_scale = 2};
    const double wanted = 2 * (std::sqrt(0.7 * 0.7 + 4 * c * c) - 2 * c);
    EXPECT_NEAR(
        element_loss(options, d, at::zeros_like(d), sigma, {}).item<double>(), wanted, 1e-6);
  }
}

TEST(ElementLoss, RenormalisedDoesNotDependOnTheAreaOfTheMask) {
  const at::Tensor prediction = at::tensor({1.0f, 2.0f, 3.0f, 4.0f}).view({2, 1, 1, 2}),
                   mask = at::tensor({1.0f, 0.5f, 0.0f, 0.0f}).view({2, 1, 1, 2});
  const at::Tensor loss = element_loss(
      {.renormalise_mask = true}, prediction, at::zeros_like(prediction), at::zeros({2}), mask);
  EXPECT_TRUE(at::allclose(loss, at::tensor({2.0f, 0.0f})));  // (1 * 1 + 4 * 0.5) / 1.5; no mask
  const at::Tensor same = at::ones({1, 1, 4, 4});
  for (const int64_t rows : {1, 2, 4}) {
    at::Tensor area = at::zeros({1, 1, 4, 4});
    area.narrow(2, 0, rows).fill_(1);
    EXPECT_FLOAT_EQ(
        element_loss({.renormalise_mask = true}, same, at::zeros_like(same), at::zeros({1}), area)
            .item<float>(),
        1);
  }
}

TEST(LossPerSample, WeightsWhateverIsPredicted) {
  const at::Tensor output = at::ones({2, 4}), zero = at::zeros({2, 4}),
                   sigma = at::tensor({0.5f, 0.0f});
  using enum WeightingScheme;
  const auto with = [&](WeightingScheme scheme) {
    return loss_per_sample({.weighting = scheme}, output, zero, zero, sigma, {});
  };
  EXPECT_TRUE(at::equal(with(kNone), at::ones({2})));
  EXPECT_TRUE(at::equal(with(kMode), at::ones({2})));                     // a density, not a weight
  EXPECT_TRUE(at::allclose(with(kSigmaSqrt), at::tensor({4.0f, 1e6f})));  // finite at sigma 0
  EXPECT_TRUE(at::allclose(with(kCosmap), loss_weights(kCosmap, sigma)));
  EXPECT_FALSE(at::allclose(with(kCosmap), at::ones({2})));
}

TEST(ElementLoss, L1HasTheSignAsGradient) {
  const at::Tensor d = at::tensor({2.0f, 0.0f, -3.0f, 1.0f}).view({1, 4}).requires_grad_(true);
  element_loss({.type = LossType::kL1}, d, at::zeros({1, 4}), at::zeros({1}), {}).sum().backward();
  EXPECT_TRUE(at::equal(d.grad(), at::tensor({0.25f, 0.0f, -0.25f, 0.25f}).view({1, 4})));
}

TEST(ElementLoss, RunsOnMetaWhateverTheType) {  // plans are made there
  const auto meta = at::TensorOptions().device(at::kMeta);
  const at::Tensor d = at::empty({2, 4}, meta), sigma = at::empty({2}, meta);
  using enum HuberSchedule;
  for (const LossType type : {LossType::kL2, LossType::kL1, LossType::kHuber, LossType::kSmoothL1})
    for (const HuberSchedule schedule : {kConstant, kExponential, kSnr})
      for (const WeightingScheme weighting :
           {WeightingScheme::kNone, WeightingScheme::kSigmaSqrt, WeightingScheme::kCosmap})
        for (const bool renormalise : {false, true})
          EXPECT_EQ(loss_per_sample({.prediction = Prediction::kSigmaScaled,
                                     .weighting = weighting,
                                     .type = type,
                                     .huber_schedule = schedule,
                                     .renormalise_mask = renormalise},
                                    d,
                                    d,
                                    d,
                                    sigma,
                                    d)
                        .sizes(),
                    (at::IntArrayRef{2}));
}

TEST(ElementLoss, RefusesShapesThatDisagree) {
  EXPECT_THROW(element_loss({}, at::zeros({2, 3}), at::zeros({2, 4}), at::zeros({2}), {}),
               std::invalid_argument);
  EXPECT_THROW(
      element_loss(
          {.type = LossType::kHuber}, at::zeros({2, 3}), at::zeros({2, 3}), at::zeros({3}), {}),
      std::invalid_argument);
}

TEST(ElementLoss, IsMultipliedByTheMaskAndNotDividedByIt) {  // golden: worked by hand
  const at::Tensor prediction = at::tensor({1.0f, 2.0f, 3.0f, 4.0f}).view({2, 1, 1, 2}),
                   mask = at::tensor({1.0f, 0.5f, 0.0f, 0.0f}).view({2, 1, 1, 2});
  const at::Tensor loss =
      element_loss({}, prediction, at::zeros_like(prediction), at::zeros({2}), mask);
  EXPECT_TRUE(at::equal(loss, at::tensor({1.5f, 0.0f})));  // (1 * 1 + 4 * 0.5) / 2
  EXPECT_TRUE(at::equal(
      loss_per_sample({}, prediction, prediction, at::zeros_like(prediction), at::zeros({2}), mask),
      loss));
  EXPECT_THROW(
      element_loss(
          {}, prediction, at::zeros_like(prediction), at::zeros({2}), at::ones({2, 1, 1, 1})),
      std::invalid_argument);
}

}  // namespace
}  // namespace flux
