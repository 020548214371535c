// Seconds an image of the autoencoder, at the width of FLUX.1's own, with random weights; see
// docs/benchmarks.md.
//
//   vae_bench [encode|decode] [bf16|f32] [side in pixels] [runs]
#include <ATen/ATen.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <string>

#include "common/core/file.h"
#include "common/models/vae/vae.h"
#include "common/tensor/device.h"

namespace {

using namespace flux;

/// Random weights by the templates of a checkpoint, scaled so that activations stay of order one.
class RandomWeights {
 public:
  void conv(const std::string& name, int64_t in, int64_t out, int64_t kernel) {
    const double scale = 1.0 / std::sqrt(static_cast<double>(in * kernel * kernel));
    tensors[name + ".weight"] = at::randn({out, in, kernel, kernel}, generator_).mul_(scale);
    tensors[name + ".bias"] = at::zeros({out});
  }
  void norm(const std::string& name, int64_t channels) {
    tensors[name + ".weight"] = at::ones({channels});
    tensors[name + ".bias"] = at::zeros({channels});
  }
  void res_block(const std::string& name, int64_t in, int64_t out) {
    norm(name + ".norm1", in);
    conv(name + ".conv1", in, out, 3);
    norm(name + ".norm2", out);
    conv(name + ".conv2", out, out, 3);
    if (in != out) conv(name + ".nin_shortcut", in, out, 1);
  }
  void ends(const std::string& half,
            int64_t in,
            int64_t first,
            int64_t middle,
            int64_t last,
            int64_t out) {
    conv(half + ".conv_in", in, first, 3);
    res_block(half + ".mid.block_1", middle, middle);
    norm(half + ".mid.attn_1.norm", middle);
    for (const char* part : {".q", ".k", ".v", ".proj_out"})
      conv(half + ".mid.attn_1" + part, middle, middle, 1);
    res_block(half + ".mid.block_2", middle, middle);
    norm(half + ".norm_out", last);
    conv(half + ".conv_out", last, out, 3);
  }

  TensorMap tensors;

 private:
  at::Generator generator_ = at::make_generator<at::CPUGeneratorImpl>(1);
};

TensorMap random_autoencoder(const vae::Config& config) {
  RandomWeights w;
  const int64_t top = config.channels * config.channel_mult.back(),
                levels = static_cast<int64_t>(config.channel_mult.size());
  w.ends("encoder", 3, config.channels, top, top, 2 * config.latent_channels);
  w.ends("decoder", config.latent_channels, top, top, config.channels, 3);
  int64_t width = config.channels;
  for (int64_t l = 0; l < levels; ++l) {
    const std::string name = "encoder.down." + std::to_string(l);
    const int64_t out = config.channels * config.channel_mult[static_cast<size_t>(l)];
    for (int64_t b = 0; b < config.num_res_blocks; ++b, width = out)
      w.res_block(name + ".block." + std::to_string(b), width, out);
    if (l + 1 < levels) w.conv(name + ".downsample.conv", out, out, 3);
  }
  for (int64_t l = levels; l-- > 0;) {
    const std::string name = "decoder.up." + std::to_string(l);
    const int64_t out = config.channels * config.channel_mult[static_cast<size_t>(l)];
    for (int64_t b = 0; b <= config.num_res_blocks; ++b, width = out)
      w.res_block(name + ".block." + std::to_string(b), width, out);
    if (l > 0) w.conv(name + ".upsample.conv", out, out, 3);
  }
  return w.tensors;
}

/// User and system time of all threads: on a busy machine steadier than the clock on the wall.
double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

}  // namespace

int main(int argc, char** argv) {
  use_huge_pages();  // as flux-cache-latents does
  const std::string what = argc > 1 ? argv[1] : "encode", precision = argc > 2 ? argv[2] : "bf16";
  const int64_t side = argc > 3 ? std::stoll(argv[3]) : 512,
                runs = argc > 4 ? std::stoll(argv[4]) : 3;
  const at::ScalarType dtype = precision == "bf16" ? at::kBFloat16 : at::kFloat;

  vae::Config config;
  TensorMap weights = random_autoencoder(config);
  const auto time = [&](auto&& run) {
    double best = 1e9, best_cpu = 1e9;
    for (int64_t i = 0; i <= runs; ++i) {  // the first one warms up
      const double cpu = cpu_seconds();
      const auto start = std::chrono::steady_clock::now();
      run();
      const double seconds =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      if (i > 0) {
        best = std::min(best, seconds);
        best_cpu = std::min(best_cpu, cpu_seconds() - cpu);
      }
    }
    std::printf(
        "vae %s %s %lldx%lld: %.2f s an image (%.2f s of CPU), best of %lld; peak RSS %.2f GB\n",
        what.c_str(),
        precision.c_str(),
        static_cast<long long>(side),
        static_cast<long long>(side),
        best,
        best_cpu,
        static_cast<long long>(runs),
        static_cast<double>(peak_rss_bytes()) / 1e9);
  };
  if (what == "encode") {
    const auto encoder =
        vae::Encoder::load(vae::encoder_half(weights, ""), config, dtype, at::kCPU);
    weights.clear();
    const at::Tensor pixels = at::rand({1, 3, side, side}) * 2 - 1;
    time([&] { encoder.encode(pixels); });
  } else {
    const auto decoder =
        vae::Decoder::load(vae::decoder_half(weights, ""), config, dtype, at::kCPU);
    weights.clear();
    const at::Tensor raw = at::randn({1, 16, side / 8, side / 8});
    time([&] { decoder.decode(raw); });
  }
}
