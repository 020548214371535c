// tests/bench/startup_empty.cpp - the least that a LibTorch program can do: the yardstick of
// flux-train's start.
#include <ATen/core/Tensor.h>
#include <ATen/ops/ones.h>

#include <cstdio>

int main() {
  std::printf("%g\n", at::ones({2, 2}).sum().item<double>());
  return 0;
}
