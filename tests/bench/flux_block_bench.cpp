// tests/bench/flux_block_bench.cpp - FLUX blocks and their operations at real width: 512x512
// pixels, 512 text tokens, batch 1, bfloat16, LoRA rank 16. Beside the wall time stands the CPU
// time of all threads, which other programs disturb less.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>

#include "common/models/flux/packing.h"
#include "common/models/flux/transformer.h"
#include "common/models/lora/lora.h"
#include "common/ops/attention.h"
#include "common/ops/linear.h"
#include "common/ops/modulate.h"
#include "common/ops/qk_norm_rope.h"

namespace flux {
namespace {

constexpr int64_t kText = 512, kImage = 1024, kTokens = kText + kImage, kHidden = 3072,
                  kMlp = 12288, kHead = 128;

at::Tensor random(at::IntArrayRef shape, double scale = 1) {
  return at::randn(shape).mul_(scale).to(at::kBFloat16);
}

/// One double and two single blocks at the real width, adapters attached.
struct Model {
  dit::Config config;
  dit::Weights weights;
  lora::Adapters adapters;
  dit::Inputs inputs;
  at::Tensor target;

  Model() {
    config.num_double_blocks = 1;
    config.num_single_blocks = 2;
    weights = dit::empty_weights(config);
    const auto canonical = [&] {
      TensorMap tensors;
      for (const auto& [path, in, out, rank, alpha] : lora::all_targets(config)) {
        tensors[path + ".weight"] = random({out, in}, 0.02);
        tensors[path + ".bias"] = random({out}, 0.02);
      }
      return tensors;
    }();
    dit::for_each_tensor(weights, [&](const std::string& name, at::Tensor& tensor) {
      const auto found = canonical.find(name);
      tensor = found != canonical.end() ? found->second : random({kHead}, 0.1) + 1;
    });
    adapters = lora::make_adapters(lora::with_rank(lora::default_targets(config), 16, 16), 1);
    for (auto& module : adapters.modules) {
      module.down.requires_grad_();
      module.up.normal_(0, 0.01).requires_grad_();
    }
    lora::attach(adapters, weights);
    inputs.img = random({1, kImage, config.in_channels});
    inputs.txt = random({1, kText, config.prompt_dim});
    inputs.y = random({1, config.pooled_dim});
    inputs.timestep = at::full({1}, 0.5f);
    inputs.guidance = at::ones({1});
    inputs.img_ids = dit::image_ids(64, 64);
    inputs.txt_ids = dit::text_ids(kText);
    target = random({1, kImage, config.out_channels});
  }
};

Model& model() {
  static Model m;
  return m;
}

void LoraStep(benchmark::State& state) {
  auto& m = model();
  for (auto _ : state) {
    const auto loss =
        (dit::forward(m.config, m.weights, m.inputs) - m.target).to(at::kFloat).pow(2).mean();
    loss.backward();
    for (auto& module : m.adapters.modules) {
      module.down.mutable_grad() = at::Tensor();
      module.up.mutable_grad() = at::Tensor();
    }
  }
}

void Forward(benchmark::State& state) {
  at::NoGradGuard no_grad;
  auto& m = model();
  for (auto _ : state) dit::forward(m.config, m.weights, m.inputs);
}

/// Runs `forward` alone, or with state.range(0) == 1 also the backward from a gradient of ones.
template <class Body>
void time(benchmark::State& state, const Body& forward) {
  const bool backward = state.range(0) == 1;
  at::AutoGradMode grad(backward);
  const auto ones = at::ones_like(forward());
  for (auto _ : state) {
    const auto out = forward();
    if (backward) out.backward(ones);
  }
}

/// Shows the rate of `products` matrix products of the MLP's first layer.
void count_products(benchmark::State& state, int64_t products) {
  state.counters["FLOP/s"] =
      benchmark::Counter(static_cast<double>(2 * products * kTokens * kHidden * kMlp),
                         benchmark::Counter::kIsIterationInvariantRate);
}

void LinearBase(benchmark::State& state) {
  const auto x = random({kTokens, kHidden}).requires_grad_();
  const Linear layer{random({kMlp, kHidden}, 0.02), random({kMlp}), {}};
  time(state, [&] { return linear(layer, x); });
  count_products(state, 1 + state.range(0));
}

void LinearLora(benchmark::State& state) {
  const auto x = random({kTokens, kHidden}).requires_grad_();
  const Linear layer{
      random({kMlp, kHidden}, 0.02),
      random({kMlp}),
      {at::randn({16, kHidden}).requires_grad_(), at::randn({kMlp, 16}).requires_grad_(), 1}};
  time(state, [&] { return linear(layer, x); });
}

void LinearFull(benchmark::State& state) {
  const auto x = random({kTokens, kHidden}).requires_grad_();
  const Linear layer{
      random({kMlp, kHidden}, 0.02).requires_grad_(), random({kMlp}).requires_grad_(), {}};
  time(state, [&] { return linear(layer, x); });
  count_products(state, 1 + 2 * state.range(0));
}

void QkNormRope(benchmark::State& state) {
  const auto qkv = random({1, kTokens, 3 * kHidden}).requires_grad_();
  const auto scale = at::ones({kHead});
  const auto rope =
      dit::rope_table(dit::Config(), at::cat({dit::text_ids(kText), dit::image_ids(64, 64)}));
  time(state, [&] {
    const auto out = qk_norm_rope(qkv, scale, scale, rope.cos, rope.sin);
    return state.range(0) ? at::stack({out.q, out.k, out.v}) : out.q;
  });
}

void Attention(benchmark::State& state) {
  const auto qkv = random({3, 1, kTokens, kHidden / kHead, kHead}).requires_grad_();
  time(state, [&] { return attention(qkv[0], qkv[1], qkv[2]); });
}

void Modulate(benchmark::State& state) {
  const auto x = random({1, kTokens, kHidden}).requires_grad_(),
             v = random({1, 1, kHidden}).requires_grad_();
  time(state, [&] { return modulate(x, v, v); });
}

void GatedResidual(benchmark::State& state) {
  const auto x = random({1, kTokens, kHidden}).requires_grad_(),
             v = random({1, 1, kHidden}).requires_grad_();
  time(state, [&] { return gated_residual(x, v, x); });
}

void Gelu(benchmark::State& state) {
  const auto x = random({1, kTokens, kMlp}).requires_grad_();
  time(state, [&] { return at::gelu(x, "tanh"); });
}

#define FLUX_BENCH(name) \
  BENCHMARK(name)->Unit(benchmark::kMillisecond)->UseRealTime()->MeasureProcessCPUTime()
FLUX_BENCH(LoraStep)->MinTime(20);
FLUX_BENCH(Forward)->MinTime(6);
FLUX_BENCH(LinearBase)->ArgName("backward")->DenseRange(0, 1)->MinTime(1);
FLUX_BENCH(LinearLora)->ArgName("backward")->DenseRange(0, 1)->MinTime(1);
FLUX_BENCH(LinearFull)->ArgName("backward")->DenseRange(0, 1)->MinTime(1);
FLUX_BENCH(QkNormRope)->ArgName("backward")->DenseRange(0, 1)->MinTime(1);
FLUX_BENCH(Attention)->ArgName("backward")->DenseRange(0, 1)->MinTime(1);
FLUX_BENCH(Modulate)->ArgName("backward")->DenseRange(0, 1)->MinTime(1);
FLUX_BENCH(GatedResidual)->ArgName("backward")->DenseRange(0, 1)->MinTime(1);
FLUX_BENCH(Gelu)->ArgName("backward")->DenseRange(0, 1)->MinTime(1);

}  // namespace
}  // namespace flux

BENCHMARK_MAIN();
