// common/models/flux/packing.h - latents as tokens, and the positions of tokens.
#pragma once
#include <ATen/core/Tensor.h>

namespace flux::dit {

/// 2x2 patches as tokens: token = row * (w/2) + column; channel = c * 4 + (row in patch) * 2 +
/// (column in patch).
///
///   latents  [B, C, h, w], h and w even
///   returns  [B, h/2 * w/2, 4 C]
///
/// Throws std::invalid_argument, naming the shape. Source: black-forest-labs/flux,
/// src/flux/sampling.py.
at::Tensor pack_latents(const at::Tensor& latents);
/// The inverse: tokens [B, h/2 * w/2, 4 C] -> [B, C, h, w].
at::Tensor unpack_latents(const at::Tensor& tokens, int64_t h, int64_t w);

/// Positions of the tokens of latents [.., h, w]: [h/2 * w/2, 3] float32 of (0, row, column).
at::Tensor image_ids(int64_t h, int64_t w);
/// Positions of text tokens, all zero: [length, 3] float32.
at::Tensor text_ids(int64_t length);

}  // namespace flux::dit
