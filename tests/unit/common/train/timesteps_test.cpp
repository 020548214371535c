#include "common/train/timesteps.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "common/train/sampler.h"
#include "tests/support/golden.h"

namespace flux {
namespace {

const TensorMap& vectors() {
  static const TensorMap map = test::golden("models/timesteps/vectors.safetensors");
  return map;
}

// One sigma for each pair of draws of the reference.
at::Tensor for_each_draw(const std::function<double(double uniform, double normal)>& sigma) {
  const at::Tensor u = vectors().at("uniform_draws").contiguous(),
                   n = vectors().at("normal_draws").contiguous();
  at::Tensor out = at::empty_like(u);
  for (int64_t i = 0; i < u.numel(); ++i) out[i] = sigma(u[i].item<double>(), n[i].item<double>());
  return out;
}

void expect_law(const std::string& name, const TimestepOptions& options, int64_t num_tokens = 0) {
  SCOPED_TRACE(name);
  const auto got =
      for_each_draw([&](double u, double n) { return sampled_sigma(options, u, n, num_tokens); });
  EXPECT_LT(test::relative_error(got, vectors().at("sigma." + name)), 3e-7);
}

TEST(SampledSigma, FollowsEveryLawOfTheReference) {
  expect_law("uniform", {.sampling = TimestepSampling::kUniform});
  for (const double scale : {1.0, 2.5}) {
    expect_law(fmt::format("sigmoid.scale{:.1f}", scale),
               {.sampling = TimestepSampling::kSigmoid, .sigmoid_scale = scale});
    for (const std::string shift : {"1.0", "3.0", "3.1582"}) {
      expect_law(fmt::format("shift.scale{:.1f}.shift{}", scale, shift),
                 {.sampling = TimestepSampling::kShift,
                  .sigmoid_scale = scale,
                  .discrete_flow_shift = std::stod(shift)});
    }
    for (const auto& [h, w] : {std::pair{64, 64}, {128, 128}, {96, 64}}) {
      expect_law(fmt::format("flux_shift.scale{:.1f}.latent{}x{}", scale, h, w),
                 {.sampling = TimestepSampling::kFluxShift, .sigmoid_scale = scale},
                 h / 2 * (w / 2));
    }
  }
}

TEST(SampledSigma, StaysWithinZeroAndOneForExtremeDraws) {
  for (const auto sampling : {TimestepSampling::kFluxShift,
                              TimestepSampling::kShift,
                              TimestepSampling::kSigmoid,
                              TimestepSampling::kUniform,
                              TimestepSampling::kSigma}) {
    for (const double normal : {-40.0, -9.0, 0.0, 9.0, 40.0}) {
      for (const double uniform : {0.0, 1 - 0x1p-53}) {
        const double sigma = sampled_sigma({.sampling = sampling}, uniform, normal, 9216);
        EXPECT_GE(sigma, 0);
        EXPECT_LE(sigma, 1);
      }
    }
  }
}

const std::vector<TimestepOptions>& laws() {
  using enum TimestepSampling;
  using enum WeightingScheme;
  static const std::vector<TimestepOptions> all{
      {.sampling = kUniform},
      {.sampling = kSigmoid},
      {.sampling = kShift},
      {.sampling = kFluxShift},
      {.sampling = kSigma},
      {.sampling = kSigma, .weighting = kLogitNormal, .logit_mean = 0.5},
      {.sampling = kSigma, .weighting = kMode, .mode_scale = kLargestModeScale},
      {.sampling = kSigma, .weighting = kMode, .mode_scale = kSmallestModeScale}};
  return all;
}

TEST(SampledSigma, OneUniformDrawIsBothDraws) {
  for (const TimestepOptions& law : laws())
    for (const double u : {0.001, 0.3, 0.5, 0.999})
      EXPECT_EQ(sampled_sigma(law, u, 1024), sampled_sigma(law, u, normal_quantile(u), 1024));
  // the quantile of 0 is infinite; draws near the ends must be numbers in range
  for (const TimestepOptions& law : laws())
    for (const double u : {0.0, 1 - 0x1p-53}) {
      EXPECT_GE(sampled_sigma(law, u, 1024), 0);
      EXPECT_LE(sampled_sigma(law, u, 1024), 1);
    }
}

TEST(SampledSigma, BoundsKeepTheShapeOfTheLawBetweenThem) {
  constexpr int kDraws = 4000;
  for (size_t i = 0; i < laws().size(); ++i) {
    SCOPED_TRACE(i);
    TimestepOptions bounded = laws()[i];
    bounded.min_timestep = 250, bounded.max_timestep = 700;
    std::vector<double> within, got;
    for (int k = 0; k < kDraws; ++k) {
      const double u = (k + 0.5) / kDraws;
      const double free = sampled_sigma(laws()[i], u, 1024);
      if (free >= 0.25 && free <= 0.7) within.push_back(free);
      got.push_back(sampled_sigma(bounded, u, 1024));
    }
    std::ranges::sort(within);
    std::ranges::sort(got);
    ASSERT_GT(within.size(), 200u);
    EXPECT_GE(got.front(), 0.25);
    EXPECT_LE(got.back(), 0.7);
    for (const double share : {0.05, 0.25, 0.5, 0.75, 0.95}) {  // quantiles of the truncated law
      const auto at = [share](const std::vector<double>& v) {
        return v[static_cast<size_t>(share * static_cast<double>(v.size() - 1))];
      };
      EXPECT_NEAR(at(got), at(within), 0.005) << share;
    }
  }
}

TEST(SampledSigma, ALawThatNeverComesBetweenTheBoundsGivesOne) {
  const TimestepOptions far{.sampling = TimestepSampling::kSigmoid,
                            .sigmoid_scale = 0.01,
                            .min_timestep = 900,
                            .max_timestep = 950};
  EXPECT_NEAR(sampled_sigma(far, 0.5, 1024), 0.9, 0.05);
}

std::vector<SampleKey> some_samples(uint64_t n) {
  std::vector<SampleKey> out;
  for (uint64_t i = 0; i < n; ++i) out.push_back({i / 5, (i * 7919 + 13) % 1000});
  return out;
}

TEST(TimestepUniforms, DependOnSeedEpochAndVisitAlone) {
  const auto samples = some_samples(6);
  const auto draws = timestep_uniforms(false, 7, 1, samples);
  EXPECT_EQ(draws, timestep_uniforms(false, 7, 2, samples));
  EXPECT_NE(draws, timestep_uniforms(false, 8, 1, samples));
  EXPECT_EQ(timestep_uniforms(false, 7, 1, std::span(samples).subspan(3, 1))[0], draws[3]);
  EXPECT_NE(timestep_uniforms(false, 7, 1, std::vector<SampleKey>{{1, 42}}),
            timestep_uniforms(false, 7, 1, std::vector<SampleKey>{{2, 42}}));
}

TEST(TimestepUniforms, StratifiedOnesFallOneIntoEachStratum) {
  for (const uint64_t n : {1, 2, 3, 8, 33}) {
    for (uint64_t step = 0; step < 20; ++step) {
      std::vector<int> hits(n, 0);
      for (const double u : timestep_uniforms(true, 7, step, some_samples(n))) {
        ASSERT_GE(u, 0);
        ASSERT_LT(u, 1);
        ++hits[static_cast<size_t>(u * static_cast<double>(n))];
      }
      EXPECT_EQ(hits, std::vector<int>(n, 1)) << n << " samples, step " << step;
    }
  }
}

TEST(TimestepUniforms, StratifiedOnesDoNotDependOnTheOrderOfSamplesButOnTheStep) {
  auto samples = some_samples(8);
  const auto draws = timestep_uniforms(true, 7, 3, samples);
  std::ranges::reverse(samples);  // as another split into micro-batches might hand them over
  auto reversed = timestep_uniforms(true, 7, 3, samples);
  std::ranges::reverse(reversed);
  EXPECT_EQ(draws, reversed);
  EXPECT_NE(draws, timestep_uniforms(true, 7, 4, some_samples(8)));
  // over many steps a sample is in all strata alike
  std::vector<int> hits(4, 0);
  for (uint64_t step = 0; step < 2000; ++step)
    ++hits[static_cast<size_t>(4 * timestep_uniforms(true, 7, step, some_samples(4))[2])];
  for (const int hit : hits) EXPECT_NEAR(hit, 500, 80);
}

TEST(FluxShiftMu, IsTheLineOfTheReference) {
  const at::Tensor tokens = vectors().at("mu.tokens"), value = vectors().at("mu.value");
  for (int64_t i = 0; i < tokens.numel(); ++i) {
    EXPECT_NEAR(flux_shift_mu(tokens[i].item<int64_t>()), value[i].item<double>(), 3e-7);
  }
}

TEST(SigmaTable, HoldsTheReferencesRowsAndIsEnteredAsThere) {
  for (const std::string shift : {"1.0", "3.0", "3.1582"}) {
    const std::vector<float> table = sigma_table(std::stod(shift));
    const at::Tensor got = at::tensor(table);
    EXPECT_LT(test::relative_error(got, vectors().at("table.shift" + shift + ".sigma")), 3e-7);
    EXPECT_LT(test::relative_error(got * 1000, vectors().at("table.shift" + shift + ".timestep")),
              3e-7);
  }
  using enum WeightingScheme;
  const std::vector<std::pair<std::string, TimestepOptions>> densities{
      {"none", {.weighting = kNone}},
      {"logit_normal.mean0.0.std1.0", {.weighting = kLogitNormal}},
      {"logit_normal.mean0.5.std0.8",
       {.weighting = kLogitNormal, .logit_mean = 0.5, .logit_std = 0.8}},
      {"mode.scale1.29", {.weighting = kMode}},
      {"mode.scale0.5", {.weighting = kMode, .mode_scale = 0.5}}};
  for (const auto& [name, options] : densities) {
    SCOPED_TRACE(name);
    const auto position =
        for_each_draw([&](double u, double n) { return sigma_table_position(options, u, n); });
    EXPECT_LT(test::relative_error(position, vectors().at("density." + name + ".u")), 3e-7);
    const at::Tensor index = vectors().at("density." + name + ".index");
    for (int64_t i = 0; i < index.numel(); ++i) {
      if (index[i].item<int64_t>() < 0) continue;  // next to a step of the table
      EXPECT_EQ(sigma_table_row(position[i].item<double>()), index[i].item<int64_t>()) << i;
    }
  }
}

TEST(SigmaTable, TakesPositionsOutsideToItsEnds) {
  EXPECT_EQ(sigma_table_row(-0.1), 0);
  EXPECT_EQ(sigma_table_row(1.0), 999);
}

TEST(SamplerSchedule, EqualsTheReference) {
  for (const auto& [width, height, steps, shift] : {std::tuple{1024, 1024, 20, true},
                                                    {512, 768, 20, true},
                                                    {1024, 1024, 4, false},
                                                    {512, 768, 4, false}}) {
    const auto name =
        fmt::format("schedule.{}x{}.steps{}.{}", width, height, steps, shift ? "shift" : "plain");
    const at::Tensor got = at::tensor(sampler_schedule(steps, width / 16 * (height / 16), shift));
    EXPECT_LT(test::relative_error(got, vectors().at(name)), 3e-7) << name;
  }
  EXPECT_THROW(sampler_schedule(0, 1024, true), std::invalid_argument);
}

}  // namespace
}  // namespace flux
