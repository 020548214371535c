// common/models/vae/norm_swish.h - GroupNorm and swish of one image, in two passes on the CPU.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace flux::vae {

inline constexpr int64_t kNormGroups = 32;
inline constexpr double kNormEpsilon = 1e-6;

/// swish(GroupNorm(x)): 32 groups, eps 1e-6, statistics in double.
///
///   x             [1, c, h, w] float32 or bfloat16
///   weight, bias  [c], dtype of x
///   buffer        working memory of the caller, made larger where it must be: the result lies in
///   it, until the next call.
///                 Mapping fresh pages for each result took a tenth of the time of encoding an
///                 image
///   returns       [1, c, h, w], dtype and device of x
///
/// On CPU with x in channels-last order the bits depend on nothing but the arguments, not on the
/// number of threads.
at::Tensor norm_swish(const at::Tensor& x,
                      const at::Tensor& weight,
                      const at::Tensor& bias,
                      at::Tensor& buffer);

}  // namespace flux::vae
