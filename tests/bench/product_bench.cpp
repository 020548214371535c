// tests/bench/product_bench.cpp - the bfloat16 products of FLUX's linear layers against LibTorch's own, in GFLOP/s.
//
//   product_bench [TOKENS...]      1536 and 4608 without any
//
// Each figure is the best of three; ours and LibTorch's take turns.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>

#include "common/ops/product.h"
#include "tests/bench/bench.h"

namespace {

constexpr int kRepeats = 3;

/// The best time of each, in seconds.
template <class Ours, class Theirs>
std::pair<double, double> best_of(const Ours& ours, const Theirs& theirs) {
  double a = 1e9, b = 1e9;
  for (int i = 0; i < kRepeats; ++i) {
    double start = flux::bench::wall_seconds();
    ours();
    a = std::min(a, flux::bench::wall_seconds() - start);
    start = flux::bench::wall_seconds();
    theirs();
    b = std::min(b, flux::bench::wall_seconds() - start);
  }
  return {a, b};
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int64_t> all_tokens;
  for (int i = 1; i < argc; ++i) all_tokens.push_back(std::atoll(argv[i]));
  if (all_tokens.empty()) all_tokens = {1536, 4608};
  fmt::print("| tokens, in -> out | forward: ours | LibTorch | dX | LibTorch | dW | LibTorch |\n");
  fmt::print("|---|---|---|---|---|---|---|\n");
  double ours_total = 0, theirs_total = 0;
  for (const int64_t tokens : all_tokens)
    for (const auto& [in, out] : std::vector<std::pair<int64_t, int64_t>>{{3072, 3072},
                                                                          {3072, 9216},
                                                                          {3072, 12288},
                                                                          {12288, 3072},
                                                                          {3072, 21504},
                                                                          {15360, 3072}}) {
      const auto x = at::randn({tokens, in}).to(at::kBFloat16),
                 dy = at::randn({tokens, out}).to(at::kBFloat16),
                 w = at::randn({out, in}).to(at::kBFloat16);
      fmt::print("| {}, {} -> {} |", tokens, in, out);
      for (const auto& [a, b] : {std::pair{x, w.t()}, {dy, w}, {dy.t(), x}}) {
        const auto result = at::empty({a.size(0), b.size(1)}, x.options());
        const auto [ours, theirs] =
            best_of([&, &a = a, &b = b] { flux::multiply({.a = a, .b = b}, result); },
                    [&a = a, &b = b] { return at::matmul(a, b); });
        const double work = 2e-9 * static_cast<double>(tokens * in * out);
        fmt::print(" {:.0f} | {:.0f} |", work / ours, work / theirs);
        std::fflush(stdout);
        ours_total += ours;
        theirs_total += theirs;
      }
      fmt::print("\n");
    }
  fmt::print("\nall: ours {:.2f} s, LibTorch {:.2f} s, {} threads\n",
             ours_total,
             theirs_total,
             at::get_num_threads());
}
