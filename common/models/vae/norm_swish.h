// common/models/vae/norm_swish.h - GroupNorm and swish of one image on the CPU: statistics of all of it, then any rows.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "common/models/vae/picture.h"

namespace flux::vae {

inline constexpr int64_t kNormGroups = 32;
inline constexpr double kNormEpsilon = 1e-6;

/// swish(GroupNorm(x)): 32 groups, eps 1e-6, statistics in double. Bits depend on nothing but the arguments, not on the
/// number of threads nor on how an image is cut into rows.
class NormSwish {
 public:
  /// Images that this computes: [1, c, h, w] float32 or bfloat16 on the CPU, channels last.
  static bool takes(const at::Tensor& x);

  ///   x             as takes() says; what rows() reads
  ///   weight, bias  [c], dtype of x
  NormSwish(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias)
      : NormSwish(Picture(x), weight, bias) {}
  /// The same bits of a picture wherever it is.
  NormSwish(Picture x, const at::Tensor& weight, const at::Tensor& bias);

  /// Rows [first, last) of the result into `out` [1, c, last - first, w], dtype of x, channels last.
  void rows(int64_t first, int64_t last, const at::Tensor& out) const;

 private:
  Picture x_;
  std::vector<float> mean_, scale_, bias_;  // of each channel
};

}  // namespace flux::vae
