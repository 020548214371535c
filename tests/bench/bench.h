// tests/bench/bench.h - clocks of the benchmark programs, and caches of realistic numbers.
#pragma once
#include <fmt/format.h>
#include <sys/resource.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "common/core/hash.h"
#include "common/dataset/dataset.h"
#include "formats/cache/manifest.h"
#include "formats/cache/writer.h"
#include "tests/support/plain_plan.h"

namespace flux::bench {

/// User and system time of all threads: on a busy machine steadier than the clock on the wall.
inline double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

inline double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline cache::Provenance provenance() { return {"bench", "0", "bench", "cpu"}; }

inline cache::Publication publication() {
  cache::Publication out;
  out.plan = test::plain_plan();
  out.plan_digest = to_hex(sha256(cache::canonical_json(out.plan)));
  return out;
}

inline cache::Recipe latents_recipe() {
  cache::Recipe recipe;
  recipe.kind = cache::Kind::kLatents;
  recipe.parameters = {{"dtype", "bf16"},
                       {"channels", 32},
                       {"store", "mean_logvar"},
                       {"precision", "f32"},
                       {"profile", "default"},
                       {"shift", 0.1159},
                       {"scale", 0.3611}};
  recipe.weights = {{"ae", std::string(64, 'a')}};
  return recipe;
}

inline cache::Recipe text_recipe(bool masked) {
  cache::Recipe recipe;
  recipe.kind = cache::Kind::kText;
  recipe.parameters = {{"dtype", "bf16"},
                       {"t5_length", 512},
                       {"t5_width", 4096},
                       {"clip_width", 768},
                       {"precision", "f32"},
                       {"pad_policy", masked ? "masked" : "full"},
                       {"clip_cleaning", "fast"}};
  recipe.weights = {{"t5", std::string(64, 'b')}, {"clip", std::string(64, 'c')}};
  recipe.tokenizers = {{"t5", std::string(64, 'd')}, {"clip", std::string(64, 'e')}};
  return recipe;
}

/// `num_channels` runs of `run` normal numbers, each channel with a mean and a scale of its own.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : engine_(seed) {}

  void add_bf16(std::vector<std::byte>& out, double mean, double scale) {
    const auto value = static_cast<float>(mean + scale * normal_(engine_));
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    bits += 0x7FFF + (bits >> 16 & 1);  // to the nearest, ties to even
    out.push_back(static_cast<std::byte>(bits >> 16));
    out.push_back(static_cast<std::byte>(bits >> 24));
  }

  /// Mean [16, 128, 128], then log-variance: of FLUX's encoder on photographs the mean has a
  /// deviation of about 2 to 3, the log-variance lies around -12.
  std::vector<std::byte> latents(int64_t rows, int64_t columns) {
    std::vector<std::byte> out;
    for (int channel = 0; channel < 32; ++channel) {
      const double mean = channel < 16 ? 0.2 * normal_(engine_) : -12 + normal_(engine_);
      const double scale = channel < 16 ? 2.5 + 0.4 * normal_(engine_) : 1.5;
      for (int64_t i = 0; i < rows * columns; ++i) add_bf16(out, mean, scale);
    }
    return out;
  }

  /// [512, 4096] of which the first `live` rows are not zero; a few columns are far larger than the
  /// rest, as in T5-XXL.
  std::vector<std::byte> prompt(int64_t live) {
    if (scales_.empty()) {
      for (int i = 0; i < 4096; ++i) scales_.push_back(0.1 * std::exp(0.5 * normal_(engine_)));
    }
    std::vector<std::byte> out;
    for (int64_t row = 0; row < live; ++row)
      for (const double scale : scales_) add_bf16(out, 0, scale);
    out.resize(size_t{2} * 512 * 4096);
    return out;
  }

  std::vector<std::byte> pooled() {
    std::vector<std::byte> out;
    for (int i = 0; i < 768; ++i) add_bf16(out, 0, 1);
    return out;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
  std::vector<double> scales_;
};

inline cache::WantedItem wanted(int64_t i, const Sha256Digest& key) {
  cache::WantedItem out;
  out.path = fmt::format("{}.png", i);
  out.item = dataset::item_digest(0, out.path);
  out.variants = {{key, 1.0, 0}};
  return out;
}

}  // namespace flux::bench
