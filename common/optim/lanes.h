// common/optim/lanes.h - sums in float32 over 16 lanes, each in its own order, which are added in double:
// the same on machines of any vector width. No LibTorch.
#pragma once
#include <cstdint>
#include <cstring>

namespace flux {

constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

/// By reference: as a value the type of a vector would depend on the version of the function.
inline __attribute__((always_inline)) void load_lanes(const float* from, Lanes& to) {
  memcpy(&to, from, sizeof to);
}

inline __attribute__((always_inline)) double sum_of_lanes(const Lanes& lanes) {
  double sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += static_cast<double>(lanes[i]);
  return sum;
}

/// The sum of n numbers.
inline __attribute__((always_inline)) double sum_of(const float* a, int64_t n) {
  Lanes sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Lanes x;
    load_lanes(a + i, x);
    sum += x;
  }
  double total = sum_of_lanes(sum);
  for (; i < n; ++i) total += static_cast<double>(a[i]);
  return total;
}

}  // namespace flux
