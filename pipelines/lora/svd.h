// pipelines/lora/svd.h - singular values of what an adapter adds, and pairs of a smaller rank.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "common/models/lora/layouts.h"
#include "pipelines/lora/options.h"

namespace flux::lora_tools {

/// u diag(s) v of a matrix [out, in], or the largest part of it.
///
///   u  [out, k], s [k] descending, v [k, in]: float64
///   square_norm  of the whole matrix (Frobenius)
struct Svd {
  at::Tensor u, s, v;
  double square_norm = 0;
};

/// Of scale * up @ down, whose product is never made: QR of both, and the SVD of a matrix as large as the rank.
///
///   up [out, rank], down [rank, in]
Svd svd_of_product(const at::Tensor& up, const at::Tensor& down, double scale);

/// The `rank` largest of a matrix [out, in]: exact where it is small or nearly all of them are wanted; else by subspace
/// iteration from random directions (keyed by `name`), which finds them to rounding where they stand out.
/// Source: Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithm 4.4.
Svd largest_singular_values(const at::Tensor& matrix, int64_t rank, const std::string& name);

/// How many singular values a rule keeps.
int64_t choose_rank(const RankRule& rule, const Svd& svd);

/// The pair of the `rank` largest: sqrt(s) in each matrix, alpha = rank, float32.
lora::Module pair_of(const Svd& svd, int64_t rank, const std::string& path);
/// Share of the Frobenius norm that `rank` singular values leave out.
double relative_error(const Svd& svd, int64_t rank);

/// Brings a module to the rank that the rule chooses; one that has no more keeps its bits, and magnitudes of DoRA stay.
/// `error` becomes the larger of itself and the module's relative error.
void reduce(lora::Module& module, const RankRule& rule, double& error);

/// Frobenius norm of what a module adds to its weight, without the magnitudes of DoRA.
double delta_norm(const lora::Module& module);

}  // namespace flux::lora_tools
