// common/train/timesteps.h - how the noise level of a training sample is drawn.
#pragma once
#include <compare>
#include <cstdint>
#include <span>
#include <vector>

#include "common/core/rng.h"

namespace flux {

/// The law that sigma follows. Source: sd-scripts' --timestep_sampling; formulas in
/// sampled_sigma().
enum class TimestepSampling { kFluxShift, kShift, kSigmoid, kUniform, kSigma };

/// sd-scripts' --weighting_scheme: which rows of the sigma table come up (logit_normal and mode, with
/// TimestepSampling::kSigma), or the loss weight (sigma_sqrt and cosmap: loss_weights()).
enum class WeightingScheme { kNone, kSigmaSqrt, kCosmap, kLogitNormal, kMode };

struct TimestepOptions {
  TimestepSampling sampling = TimestepSampling::kFluxShift;
  double sigmoid_scale = 1.0;        // sigmoid, shift, flux_shift: width of the normal draw
  double discrete_flow_shift = 3.0;  // shift, sigma
  WeightingScheme weighting = WeightingScheme::kNone;  // sigma: the density below
  double logit_mean = 0.0, logit_std = 1.0;            // density logit_normal
  double mode_scale = 1.29;                      // density mode, kSmallestModeScale .. kLargest
  double min_timestep = 0, max_timestep = 1000;  // of 1000 sigma: the law within these bounds
  bool stratified = false;                       // see timestep_uniforms()
};

/// 1 / (1 + exp(-scale * normal))
double sigmoid_sigma(double normal, double scale);
/// shift * sigma / (1 + (shift - 1) * sigma); shift 1 changes nothing.
double shifted_sigma(double sigma, double shift);
/// The line through (256 tokens, 0.5) and (4096 tokens, 1.15), not clamped. Tokens of an image:
/// width/16 * height/16.
double flux_shift_mu(int64_t num_image_tokens);
/// e^mu / (e^mu + 1/sigma - 1): shifted_sigma with shift = e^mu. 0 stays 0.
double flux_shifted_sigma(double sigma, double mu);

/// Between these the density mode falls over its whole range, as a change of variable must: -1 and 2 / (pi - 2).
/// Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.
inline constexpr double kSmallestModeScale = -1, kLargestModeScale = 1.7519383938841722;

/// Rows of the sigma table: training timesteps 1000, 999 .. 1, so row 0 is pure noise.
inline constexpr int64_t kSigmaTableRows = 1000;
/// Row i = shifted_sigma((1000 - i) / 1000, shift).
std::vector<float> sigma_table(double shift);
/// Where in the table, 0 = pure noise .. 1 = clean: sigmoid(mean + std * normal) for logit_normal,
/// 1 - u - mode_scale * (cos^2(pi u / 2) - 1 + u) for mode, else u = `uniform`.
double sigma_table_position(const TimestepOptions& options, double uniform, double normal);
/// floor(1000 * position), kept within the table.
int64_t sigma_table_row(double position);

/// Sigma in [0, 1] from one uniform draw in [0, 1) and one standard normal draw. `num_image_tokens`
/// matters to flux_shift. Source: Esser et al. 2024, arXiv:2403.03206, section 3.1; sd-scripts
/// library/flux_train_utils.py for the names.
double sampled_sigma(const TimestepOptions& options,
                     double uniform,
                     double normal,
                     int64_t num_image_tokens);
/// The same from one uniform draw in [0, 1), the normal one being its quantile, and kept within min_timestep and
/// max_timestep: the draw is mapped onto the part of [0, 1) that gives sigmas between them, so that the law keeps its
/// shape there. A law that never comes there gives its nearest bound.
double sampled_sigma(const TimestepOptions& options, double uniform, int64_t num_image_tokens);

/// What names the random draws of one sample of an update.
struct SampleKey {
  uint64_t epoch = 0, visit = 0;
  auto operator<=>(const SampleKey&) const = default;
};

/// One uniform draw in [0, 1) for each sample of update number `step`. Stratified: of n samples exactly one falls into
/// each [k/n, (k+1)/n); which one is a permutation keyed by (seed, step) over the samples in the order of their keys,
/// so the draws depend on the set of samples only, not on how it is split into micro-batches.
std::vector<double> timestep_uniforms(bool stratified,
                                      uint64_t seed,
                                      uint64_t step,
                                      std::span<const SampleKey> samples);

}  // namespace flux
