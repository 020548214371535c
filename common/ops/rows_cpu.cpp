#include "common/ops/rows_cpu.h"

// An address sanitizer is not ready yet when the loader picks a version.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define FLUX_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define FLUX_CLONES
#endif

namespace flux::kernel {
namespace {

constexpr auto kAlone = [](float value) FLUX_PACK_LAMBDA { return value; };

}  // namespace

// A template would have one version only. Arguments are copied so that no store may change them.
#define FLUX_ROWS_CPU(T)                                                                        \
  FLUX_CLONES void modulate_cpu(const ModulateForward<T>& args, int64_t first, int64_t last) {  \
    const auto a = args;                                                                        \
    for (int64_t row = first; row < last; ++row) modulate_row(a, row, 0, 1, kAlone);            \
  }                                                                                             \
  FLUX_CLONES void modulate_cpu(const ModulateBackward<T>& args, int64_t first, int64_t last) { \
    const auto a = args;                                                                        \
    for (int64_t i = first; i < last; ++i) modulate_backward_group(a, i, 0, 1, kAlone);         \
  }                                                                                             \
  FLUX_CLONES void gated_cpu(const GatedForward<T>& args, int64_t first, int64_t last) {        \
    const auto a = args;                                                                        \
    for (int64_t row = first; row < last; ++row) gated_row(a, row, 0, 1);                       \
  }                                                                                             \
  FLUX_CLONES void gated_cpu(const GatedBackward<T>& args, int64_t first, int64_t last) {       \
    const auto a = args;                                                                        \
    for (int64_t i = first; i < last; ++i) gated_backward_group(a, i, 0, 1);                    \
  }                                                                                             \
  FLUX_CLONES void add_groups_cpu(const GroupSums<T>& args, int64_t first, int64_t last) {      \
    const auto a = args;                                                                        \
    for (int64_t sample = first; sample < last; ++sample) add_groups(a, sample, 0, 1);          \
  }                                                                                             \
  FLUX_CLONES void gelu_cpu(const GeluForward<T>& args, int64_t first, int64_t last) {          \
    const auto a = args;                                                                        \
    for (int64_t row = first; row < last; ++row) gelu_row(a, row, 0, 1);                        \
  }                                                                                             \
  FLUX_CLONES void gelu_cpu(const GeluBackward<T>& args, int64_t first, int64_t last) {         \
    const auto a = args;                                                                        \
    for (int64_t row = first; row < last; ++row) gelu_backward_row(a, row, 0, 1);               \
  }                                                                                             \
  FLUX_CLONES void loss_cpu(const LossForward<T>& args, int64_t first, int64_t last) {          \
    const auto a = args;                                                                        \
    for (int64_t i = first; i < last; ++i) loss_group(a, i, 0, 1, kAlone);                      \
  }                                                                                             \
  FLUX_CLONES void loss_cpu(const LossBackward<T>& args, int64_t first, int64_t last) {         \
    const auto a = args;                                                                        \
    for (int64_t row = first; row < last; ++row) loss_backward_row(a, row, 0, 1);               \
  }
FLUX_ROWS_CPU(float)
FLUX_ROWS_CPU(Bf16Bits)
#undef FLUX_ROWS_CPU

}  // namespace flux::kernel
