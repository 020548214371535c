#include "common/train/euler.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <optional>
#include <stdexcept>

#include "common/core/rng.h"
#include "common/models/flux/packing.h"
#include "common/train/sampler.h"

namespace flux {
namespace {

dit::Inputs inputs_of(const SampleInputs& picture, bool negative, double guidance) {
  dit::Inputs in;
  in.txt = negative ? picture.negative_embedding : picture.prompt_embedding;
  in.y = negative ? picture.negative_pooled : picture.pooled_embedding;
  const at::Tensor& mask = negative ? picture.negative_mask : picture.text_mask;
  if (mask.defined()) in.text_mask = mask;
  const auto numbers = picture.noise.options();
  in.guidance = at::full({1}, guidance, numbers);
  in.img_ids = dit::image_ids(picture.noise.size(2), picture.noise.size(3)).to(numbers.device());
  in.txt_ids = dit::text_ids(in.txt.size(1)).to(numbers.device());
  return in;
}

}  // namespace

std::vector<at::Tensor> euler_sample(const Predict& predict,
                                     const EulerOptions& options,
                                     std::span<const SampleInputs> pictures,
                                     const AfterStep& after_step) {
  if (options.sigmas.size() < 2) throw std::invalid_argument("euler_sample: no steps");
  std::vector<dit::Inputs> inputs;
  std::vector<std::optional<size_t>> negative_of;  // by picture: its place in `inputs`
  for (const SampleInputs& picture : pictures)
    inputs.push_back(inputs_of(picture, /*negative=*/false, options.guidance));
  for (const SampleInputs& picture : pictures) {
    negative_of.emplace_back();
    if (!picture.negative_embedding.defined()) continue;
    negative_of.back() = inputs.size();
    inputs.push_back(inputs_of(picture, /*negative=*/true, options.guidance));
  }
  std::vector<at::Tensor> x;
  for (const SampleInputs& picture : pictures)
    x.push_back(dit::pack_latents(picture.noise.to(at::kFloat)));
  for (size_t step = 0; step + 1 < options.sigmas.size(); ++step) {
    const double sigma = options.sigmas[step], next = options.sigmas[step + 1];
    for (size_t i = 0; i < x.size(); ++i) {
      inputs[i].img = x[i];
      inputs[i].timestep = at::full({1}, sigma, x[i].options());
      if (!negative_of[i]) continue;
      inputs[*negative_of[i]].img = x[i];
      inputs[*negative_of[i]].timestep = inputs[i].timestep;
    }
    const std::vector<at::Tensor> velocities = predict(inputs);
    for (size_t i = 0; i < x.size(); ++i) {
      at::Tensor velocity = velocities[i].to(at::kFloat);
      if (negative_of[i]) {
        const at::Tensor negative = velocities[*negative_of[i]].to(at::kFloat);
        velocity = negative + (velocity - negative) * options.cfg_scale;
      }
      x[i] = euler_step(x[i], velocity, sigma, next);
    }
    if (after_step) after_step(static_cast<int64_t>(step) + 1, x);
  }
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = dit::unpack_latents(x[i], pictures[i].noise.size(2), pictures[i].noise.size(3))
               .contiguous();
  return x;
}

at::Tensor sample_noise(
    uint64_t seed, uint64_t prompt, uint64_t index, int64_t channels, int64_t h, int64_t w) {
  const at::Tensor noise = at::empty({1, channels, h, w}, at::kFloat);
  RandomStream(seed, Purpose::kSampling, prompt, index)
      .fill_normal({noise.mutable_data_ptr<float>(), static_cast<size_t>(noise.numel())});
  return noise;
}

}  // namespace flux
