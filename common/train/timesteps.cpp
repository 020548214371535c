#include "common/train/timesteps.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

namespace flux {

double sigmoid_sigma(double normal, double scale) { return 1 / (1 + std::exp(-scale * normal)); }

double shifted_sigma(double sigma, double shift) {
  return shift * sigma / (1 + (shift - 1) * sigma);
}

double flux_shift_mu(int64_t num_image_tokens) {
  constexpr double kSlope = (1.15 - 0.5) / (4096 - 256);
  return 0.5 + kSlope * static_cast<double>(num_image_tokens - 256);
}

double flux_shifted_sigma(double sigma, double mu) { return shifted_sigma(sigma, std::exp(mu)); }

std::vector<float> sigma_table(double shift) {
  std::vector<float> table(kSigmaTableRows);
  for (int64_t row = 0; row < kSigmaTableRows; ++row) {
    const double sigma =
        static_cast<double>(kSigmaTableRows - row) / static_cast<double>(kSigmaTableRows);
    table[static_cast<size_t>(row)] = static_cast<float>(shifted_sigma(sigma, shift));
  }
  return table;
}

double sigma_table_position(const TimestepOptions& options, double uniform, double normal) {
  if (options.weighting == WeightingScheme::kLogitNormal) {
    return sigmoid_sigma(options.logit_mean + options.logit_std * normal, 1);
  }
  if (options.weighting == WeightingScheme::kMode) {
    const double cosine = std::cos(std::numbers::pi / 2 * uniform);
    return 1 - uniform - options.mode_scale * (cosine * cosine - 1 + uniform);
  }
  return uniform;
}

int64_t sigma_table_row(double position) {
  const double row = std::floor(position * static_cast<double>(kSigmaTableRows));
  return static_cast<int64_t>(std::clamp(row, 0.0, static_cast<double>(kSigmaTableRows - 1)));
}

double sampled_sigma(const TimestepOptions& options,
                     double uniform,
                     double normal,
                     int64_t num_image_tokens) {
  switch (options.sampling) {
    case TimestepSampling::kUniform:
      return uniform;
    case TimestepSampling::kSigmoid:
      return sigmoid_sigma(normal, options.sigmoid_scale);
    case TimestepSampling::kShift:
      return shifted_sigma(sigmoid_sigma(normal, options.sigmoid_scale),
                           options.discrete_flow_shift);
    case TimestepSampling::kFluxShift:
      return flux_shifted_sigma(sigmoid_sigma(normal, options.sigmoid_scale),
                                flux_shift_mu(num_image_tokens));
    case TimestepSampling::kSigma:
      break;
  }
  const int64_t row = sigma_table_row(sigma_table_position(options, uniform, normal));
  return shifted_sigma(
      static_cast<double>(kSigmaTableRows - row) / static_cast<double>(kSigmaTableRows),
      options.discrete_flow_shift);
}

namespace {

constexpr double kBelowOne = 1 - 0x1p-53;

double unbounded_sigma(const TimestepOptions& options, double uniform, int64_t num_image_tokens) {
  // infinite normal values are of no use
  const double share = std::clamp(uniform, 0x1p-54, kBelowOne);
  return sampled_sigma(options, uniform, normal_quantile(share), num_image_tokens);
}

/// The smallest u in [0, 1] where `reached` holds; once it holds it goes on to.
template <class F>
double first_where(const F& reached) {
  if (reached(0)) return 0;
  if (!reached(kBelowOne)) return 1;
  double below = 0, above = kBelowOne;
  for (int i = 0; i < 60; ++i) {
    const double middle = below + (above - below) / 2;
    (reached(middle) ? above : below) = middle;
  }
  return above;
}

}  // namespace

double sampled_sigma(const TimestepOptions& options, double uniform, int64_t num_image_tokens) {
  const auto sigma = [&](double u) { return unbounded_sigma(options, u, num_image_tokens); };
  if (options.min_timestep <= 0 && options.max_timestep >= 1000) return sigma(uniform);
  const double low = options.min_timestep / 1000, high = options.max_timestep / 1000;
  double from = 0, to = 1;
  if (sigma(kBelowOne) >= sigma(0)) {
    from = first_where([&](double u) { return sigma(u) >= low; });
    to = first_where([&](double u) { return sigma(u) > high; });
  } else {
    from = first_where([&](double u) { return sigma(u) <= high; });
    to = first_where([&](double u) { return sigma(u) < low; });
  }
  return std::clamp(sigma(std::min(from + uniform * (to - from), kBelowOne)), low, high);
}

std::vector<double> timestep_uniforms(bool stratified,
                                      uint64_t seed,
                                      uint64_t step,
                                      std::span<const SampleKey> samples) {
  std::vector<double> draws;
  for (const SampleKey& sample : samples)
    draws.push_back(RandomStream(seed, Purpose::kTimestep, sample.epoch, sample.visit).uniform(0));
  if (!stratified) return draws;
  std::vector<size_t> order(samples.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(
      order.begin(), order.end(), [&](size_t a, size_t b) { return samples[a] < samples[b]; });
  const auto strata =
      RandomStream(seed, Purpose::kTimestepStratum, step).permutation(samples.size());
  const auto n = static_cast<double>(samples.size());
  for (size_t i = 0; i < order.size(); ++i) {
    double& draw = draws[order[i]];
    draw = std::min((static_cast<double>(strata[i]) + draw) / n, kBelowOne);
  }
  return draws;
}

}  // namespace flux
