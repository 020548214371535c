// common/ops/adapter.h - what linear() does for LoKr and DoRA beside its two products.
#pragma once
#include <ATen/core/Tensor.h>

#include "common/ops/linear.h"

namespace flux {

/// y + scale * x kron(mix, up down)^T without that matrix: x falls into C pieces per row, which go through down, are
/// mixed and go through up. In place.
///
///   y  [n, out], x [n, in]; the adapter as at LowRank
at::Tensor add_kronecker(const at::Tensor& y, const at::Tensor& x, const LowRank& adapter);

/// Adds delta to rows [first, first + rows of `out`) of a matrix. Not differentiable.
///
///   out  [rows, in] float32; with LoKr whole groups of B rows, from the start of one
void add_delta(const at::Tensor& out, int64_t first, const LowRank& adapter);
/// Rows that add_delta() is given at once of a matrix [.., in].
int64_t delta_rows(int64_t in, const LowRank& adapter);

/// (y - bias) * magnitude / norms + bias by columns, computed in float32, with the bits of y where magnitude equals norms.
///
///   y  [n, out]; bias [out] or undefined; magnitude [out, 1], norms [out]: float32
at::Tensor scale_rows(const at::Tensor& y,
                      const at::Tensor& bias,
                      const at::Tensor& magnitude,
                      const at::Tensor& norms);

}  // namespace flux
