#include "common/models/flux/packing.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <stdexcept>

#include "common/tensor/tensor.h"

namespace flux::dit {

at::Tensor pack_latents(const at::Tensor& latents) {
  if (latents.dim() != 4 || latents.size(2) % 2 != 0 || latents.size(3) % 2 != 0)
    throw std::invalid_argument("pack_latents: latents " + shape_text(latents) +
                                " are not [B, C, h, w] with even h and w");
  const int64_t b = latents.size(0), c = latents.size(1), rows = latents.size(2) / 2,
                columns = latents.size(3) / 2;
  return latents.reshape({b, c, rows, 2, columns, 2})
      .permute({0, 2, 4, 1, 3, 5})
      .reshape({b, rows * columns, 4 * c});
}

at::Tensor unpack_latents(const at::Tensor& tokens, int64_t h, int64_t w) {
  if (tokens.dim() != 3 || h % 2 != 0 || w % 2 != 0 || tokens.size(1) != h / 2 * (w / 2) ||
      tokens.size(2) % 4 != 0)
    throw std::invalid_argument(fmt::format(
        "unpack_latents: tokens {} are not those of latents {} x {}", shape_text(tokens), h, w));
  const int64_t b = tokens.size(0), c = tokens.size(2) / 4;
  return tokens.reshape({b, h / 2, w / 2, c, 2, 2})
      .permute({0, 3, 1, 4, 2, 5})
      .reshape({b, c, h, w});
}

at::Tensor image_ids(int64_t h, int64_t w) {
  const auto ids = at::zeros({h / 2, w / 2, 3}, at::kFloat);
  ids.select(2, 1).copy_(at::arange(h / 2, at::kFloat).unsqueeze(1).expand({-1, w / 2}));
  ids.select(2, 2).copy_(at::arange(w / 2, at::kFloat).expand({h / 2, -1}));
  return ids.view({-1, 3});
}

at::Tensor text_ids(int64_t length) { return at::zeros({length, 3}, at::kFloat); }

}  // namespace flux::dit
