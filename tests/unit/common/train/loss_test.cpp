#include "common/train/loss.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

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
