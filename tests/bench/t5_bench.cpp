// Seconds a caption of the T5 encoder, at the width of T5-XXL, with random weights; see
// docs/benchmarks.md. The token table is small and some layers stand for 24: time per layer is what
// is measured.
//
//   t5_bench [bf16|f32] [tokens] [layers] [captions in a batch] [runs] [live tokens: masked captions]
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "common/core/file.h"
#include "common/models/t5/t5.h"
#include "common/tensor/device.h"
#include "tests/bench/bench.h"

namespace {

using namespace flux;

TensorMap random_weights(const t5::Config& config, at::ScalarType dtype) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(1);
  TensorMap weights;
  const auto matrix = [&](const std::string& name, int64_t rows, int64_t columns, double scale) {
    weights[name + ".weight"] = at::randn({rows, columns}, generator).mul_(scale).to(dtype);
  };
  const int64_t inner = config.num_heads * config.head_size;
  const double by_width = 1 / std::sqrt(static_cast<double>(config.width));
  matrix("shared", config.vocabulary, config.width, 1);
  matrix("encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
         t5::kNumBuckets,
         config.num_heads,
         1);
  weights["encoder.final_layer_norm.weight"] = at::ones({config.width});
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string block = "encoder.block." + std::to_string(i) + ".";
    // scores are not divided by sqrt(head size), so q is drawn smaller
    matrix(block + "layer.0.SelfAttention.q",
           inner,
           config.width,
           by_width / std::sqrt(static_cast<double>(config.head_size)));
    matrix(block + "layer.0.SelfAttention.k", inner, config.width, by_width);
    matrix(block + "layer.0.SelfAttention.v", inner, config.width, by_width);
    matrix(block + "layer.0.SelfAttention.o", config.width, inner, by_width);
    matrix(block + "layer.1.DenseReluDense.wi_0", config.mlp, config.width, by_width);
    matrix(block + "layer.1.DenseReluDense.wi_1", config.mlp, config.width, by_width);
    matrix(block + "layer.1.DenseReluDense.wo", config.width, config.mlp, by_width);
    weights[block + "layer.0.layer_norm.weight"] = at::ones({config.width});
    weights[block + "layer.1.layer_norm.weight"] = at::ones({config.width});
  }
  return weights;
}

}  // namespace

int main(int argc, char** argv) {
  use_huge_pages();  // as flux-cache-text does
  const std::string precision = argc > 1 ? argv[1] : "bf16";
  const auto number = [&](int i, int64_t fallback) {
    return argc > i ? std::stoll(argv[i]) : fallback;
  };
  const int64_t tokens = number(2, 512), batch = number(4, 1), runs = number(5, 3);
  t5::Config config;
  config.num_layers = number(3, 2);
  config.vocabulary = 1000;
  const at::ScalarType dtype = precision == "bf16" ? at::kBFloat16 : at::kFloat;
  const auto encoder = t5::Encoder::load(random_weights(config, dtype), config, dtype, at::kCPU);
  const at::Tensor ids = at::randint(1, config.vocabulary, {batch, tokens}, at::kLong);
  const int64_t live = number(6, 0);
  const at::Tensor mask =
      live > 0 ? at::arange(tokens).lt(live).expand({batch, tokens}) : at::Tensor();

  double best = 1e9, best_cpu = 1e9;
  for (int64_t i = 0; i <= runs; ++i) {  // the first one warms up
    const double cpu = bench::cpu_seconds(), start = bench::wall_seconds();
    encoder.encode(ids, mask);
    if (i == 0) continue;
    best = std::min(best, bench::wall_seconds() - start);
    best_cpu = std::min(best_cpu, bench::cpu_seconds() - cpu);
  }
  const auto layers = static_cast<double>(config.num_layers * batch);
  std::printf(
      "t5 %s %lld tokens (%lld live), batch %lld: %.3f s (%.3f s of CPU) a layer and caption, so "
      "%.2f s a "
      "caption of 24 layers; peak RSS %.2f GB\n",
      precision.c_str(),
      static_cast<long long>(tokens),
      static_cast<long long>(live > 0 ? live : tokens),
      static_cast<long long>(batch),
      best / layers,
      best_cpu / layers,
      24 * best / layers,
      static_cast<double>(peak_rss_bytes()) / 1e9);
}
