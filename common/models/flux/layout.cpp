#include "common/models/flux/layout.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "common/models/flux/names.h"

namespace flux::dit {

const std::vector<std::pair<std::string, ModelLayout>>& model_layouts() {
  static const std::vector<std::pair<std::string, ModelLayout>> words{
      {"bfl", ModelLayout::kBfl}, {"diffusers", ModelLayout::kDiffusers}};
  return words;
}

FileTensors::FileTensors(const Config& config, ModelLayout layout) {
  if (layout == ModelLayout::kBfl) {
    for (const auto& [name, shape] : tensor_shapes(config)) pieces_[name] = {{name, 0, shape}};
  } else {
    for (const auto& tensor : diffusers_layout(config))
      pieces_[tensor.bfl].push_back(
          {tensor.name, tensor.first_row, tensor.shape, tensor.swap_halves});
  }
}

const std::vector<FileTensors::Piece>& FileTensors::pieces(const std::string& bfl) const {
  const auto found = pieces_.find(bfl);
  if (found == pieces_.end()) throw std::invalid_argument("no tensor " + bfl);
  return found->second;
}

void FileTensors::split(
    const std::string& bfl,
    const at::Tensor& tensor,
    const std::function<void(const std::string& name, const at::Tensor& piece)>& take) const {
  for (const Piece& piece : pieces(bfl)) {
    at::Tensor rows = tensor.detach().narrow(0, piece.first_row, piece.shape[0]);
    if (piece.swap_halves) {
      const auto halves = rows.chunk(2, 0);
      rows = at::cat({halves[1], halves[0]}, 0);
    }
    take(piece.name, rows.cpu().contiguous());
  }
}

void FileTensors::split_part(
    const std::string& bfl,
    const at::Tensor& part,
    int64_t offset,
    const std::function<void(const std::string& name, int64_t first, const at::Tensor& elements)>&
        take) const {
  const at::Tensor values = part.detach().cpu().contiguous().view({-1});
  const int64_t end = offset + values.numel();
  for (const Piece& piece : pieces(bfl)) {
    int64_t row = 1;
    for (size_t d = 1; d < piece.shape.size(); ++d) row *= piece.shape[d];
    // halves that change places are two runs of rows
    const int64_t num_runs = piece.swap_halves ? 2 : 1, run = piece.shape[0] * row / num_runs;
    for (int64_t i = 0; i < num_runs; ++i) {
      const int64_t begin = piece.first_row * row + i * run,
                    in_piece = (piece.swap_halves ? 1 - i : 0) * run;
      const int64_t from = std::max(begin, offset), to = std::min(begin + run, end);
      if (from < to)
        take(piece.name, in_piece + from - begin, values.narrow(0, from - offset, to - from));
    }
  }
}

std::string diffusers_config_json(const Config& c) {
  const nlohmann::json json{{"_class_name", "FluxTransformer2DModel"},
                            {"patch_size", 1},
                            {"in_channels", c.in_channels},
                            {"out_channels", c.out_channels},
                            {"num_layers", c.num_double_blocks},
                            {"num_single_layers", c.num_single_blocks},
                            {"attention_head_dim", c.head_dim()},
                            {"num_attention_heads", c.num_heads},
                            {"joint_attention_dim", c.prompt_dim},
                            {"pooled_projection_dim", c.pooled_dim},
                            {"guidance_embeds", c.guidance},
                            {"axes_dims_rope", c.axes}};
  return json.dump(2) + "\n";
}

}  // namespace flux::dit
