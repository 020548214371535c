#include "common/train/timesteps.h"

#include <algorithm>
#include <cmath>
#include <numbers>

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

double sampled_sigma(const TimestepOptions& options,
                     const RandomStream& stream,
                     int64_t num_image_tokens) {
  return sampled_sigma(options, stream.uniform(2), stream.normal(0), num_image_tokens);
}

}  // namespace flux
