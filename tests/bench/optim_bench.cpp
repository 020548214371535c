// Parameters a second of each optimizer's step, and what it allocates beyond weights, gradients and
// states.
//   optim_bench [KIND...] [--parameters N] [--dtype bf16|f32] [--weights stochastic|nearest|kahan|master]
//               [--threads N] [--repeats N]
// optim_bench.py runs the same with bitsandbytes and transformers.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "common/optim/optimizer.h"
#include "tests/bench/bench.h"

namespace flux {
namespace {

/// VmHWM in bytes, since it was last reset.
double peak_bytes(const char* key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(key))
      return 1024 * std::strtod(line.c_str() + line.find(':') + 1, nullptr);
  }
  return 0;
}

struct Settings {
  int64_t rows = 21'824, columns = 3072;  // 67 million
  at::ScalarType dtype = at::kBFloat16;
  WeightMode weights = WeightMode::kStochastic;
  int repeats = 10;
};

void measure(const std::string& kind, const OptimizerOptions& options, const Settings& settings) {
  const auto optimizer = make_optimizer(options, {.weights = settings.weights});
  Slot slot;
  at::manual_seed(1);
  slot.parameter = (at::randn({settings.rows, settings.columns}) * 0.02).to(settings.dtype);
  slot.gradient = (at::randn({settings.rows, settings.columns}) * 1e-3).to(settings.dtype);
  for (const StateTensor& state : optimizer->state_layout(slot.parameter.sizes(), settings.dtype))
    slot.states.push_back(at::zeros(state.shape, at::device(at::kCPU).dtype(state.dtype)));
  const auto step = [&](int64_t t) {
    const StepScalars scalars{.step = t, .learning_rate = 1e-3, .seed = 1};
    optimizer->begin_step(scalars);
    if (optimizer->two_phase()) {
      optimizer->observe(slot, scalars);
      optimizer->end_observe();
    }
    optimizer->step(slot, scalars);
  };
  step(1);                                      // touches the states
  std::ofstream("/proc/self/clear_refs") << 5;  // the peak begins anew
  const double before = peak_bytes("VmRSS");
  std::vector<double> seconds;
  for (int i = 0; i < settings.repeats; ++i) {
    const double start = bench::wall_seconds();
    step(i + 2);
    seconds.push_back(bench::wall_seconds() - start);
  }
  std::sort(seconds.begin(), seconds.end());
  const auto n = static_cast<double>(slot.parameter.numel());
  fmt::print("{:12} {:6.0f} M/s best {:6.0f} M/s median  extra {:.2f} MiB\n",
             kind,
             n / seconds.front() / 1e6,
             n / seconds[seconds.size() / 2] / 1e6,
             (peak_bytes("VmHWM") - before) / 1048576);
}

/// Reads `bytes` at the speed of memory: what physics would allow.
void measure_copy() {
  const at::Tensor from = at::ones({1 << 27}, at::kFloat);
  at::Tensor to = at::zeros({1 << 27}, at::kFloat);
  double best = 1e9;
  for (int i = 0; i < 5; ++i) {
    const double start = bench::wall_seconds();
    to.copy_(from);
    best = std::min(best, bench::wall_seconds() - start);
  }
  fmt::print(
      "{:12} {:6.1f} GB/s copied (read and written)\n", "memory", 2 * 4.0 * (1 << 27) / best / 1e9);
}

}  // namespace
}  // namespace flux

int main(int argc, char** argv) {
  using namespace flux;
  const std::map<std::string, OptimizerOptions> kinds{{"adamw", AdamWOptions{}},
                                                      {"adamw8bit", AdamW8bitOptions{}},
                                                      {"adafactor", AdafactorOptions{}},
                                                      {"lion", LionOptions{}},
                                                      {"prodigy", ProdigyOptions{}},
                                                      {"schedulefree", ScheduleFreeOptions{}},
                                                      {"sgd", SgdOptions{}}};
  Settings settings;
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (!word.starts_with("--")) {
      wanted.push_back(word);
      continue;
    }
    if (++i == argc) return fmt::print(stderr, "{} needs a value\n", word), 2;
    const std::string value = argv[i];
    if (word == "--parameters") {
      settings.rows = std::max<int64_t>(1, std::stoll(value) / settings.columns);
    } else if (word == "--dtype") {
      settings.dtype = value == "f32" ? at::kFloat : at::kBFloat16;
    } else if (word == "--weights") {
      settings.weights = value == "nearest"  ? WeightMode::kNearest
                         : value == "kahan"  ? WeightMode::kKahan
                         : value == "master" ? WeightMode::kMaster
                                             : WeightMode::kStochastic;
    } else if (word == "--threads") {
      at::set_num_threads(std::stoi(value));
    } else if (word == "--repeats") {
      settings.repeats = std::stoi(value);
    } else {
      return fmt::print(stderr, "unknown flag {}\n", word), 2;
    }
  }
  measure_copy();
  for (const auto& [kind, options] : kinds) {
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), kind) != wanted.end())
      measure(kind, options, settings);
  }
}
