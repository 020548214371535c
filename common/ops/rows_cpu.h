// common/ops/rows_cpu.h - the CPU kernels of rows_kernel.h on a range of rows, groups or samples. No LibTorch, so that
// they have their own compiler flags: a version for AVX-512, AVX2 and plain x86-64, chosen when the program starts; all
// give the same bits.
#pragma once
#include "common/ops/rows_kernel.h"

namespace flux::kernel {

#define FLUX_ROWS_CPU(T)                                                           \
  void modulate_cpu(const ModulateForward<T>& args, int64_t first, int64_t last);  \
  void modulate_cpu(const ModulateBackward<T>& args, int64_t first, int64_t last); \
  void gated_cpu(const GatedForward<T>& args, int64_t first, int64_t last);        \
  void gated_cpu(const GatedBackward<T>& args, int64_t first, int64_t last);       \
  void add_groups_cpu(const GroupSums<T>& args, int64_t first, int64_t last);      \
  void gelu_cpu(const GeluForward<T>& args, int64_t first, int64_t last);          \
  void gelu_cpu(const GeluBackward<T>& args, int64_t first, int64_t last);         \
  void loss_cpu(const LossForward<T>& args, int64_t first, int64_t last);          \
  void loss_cpu(const LossBackward<T>& args, int64_t first, int64_t last);
FLUX_ROWS_CPU(float)
FLUX_ROWS_CPU(Bf16Bits)
#undef FLUX_ROWS_CPU

}  // namespace flux::kernel
