// common/models/flux/layout.h - under which names a model's tensors are written.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "common/models/flux/config.h"
#include "common/tensor/fwd.h"

namespace flux::dit {

/// kBfl: black-forest-labs/flux, q, k, v (and the MLP half of linear1) in one tensor. kDiffusers:
/// huggingface/diffusers, each its own.
enum class ModelLayout { kBfl, kDiffusers };
/// {"bfl", kBfl}, {"diffusers", kDiffusers}.
const std::vector<std::pair<std::string, ModelLayout>>& model_layouts();

/// The tensors of a layout by the BFL tensor that they are rows of.
class FileTensors {
 public:
  FileTensors(const Config& config, ModelLayout layout);

  struct Piece {
    std::string name;
    int64_t first_row = 0;
    std::vector<int64_t> shape;
    bool swap_halves = false;  // the halves of its rows change places
  };
  /// Throws std::invalid_argument for an unknown name.
  const std::vector<Piece>& pieces(const std::string& bfl) const;

  /// Calls `take` with the tensors that the BFL tensor becomes, contiguous and on the CPU: views of it, but for what is
  /// turned around or on another device.
  void split(
      const std::string& bfl,
      const at::Tensor& tensor,
      const std::function<void(const std::string& name, const at::Tensor& piece)>& take) const;

  /// The same of elements [offset, offset + part.numel()) of the flattened BFL tensor: ranges of the tensors that it
  /// becomes, one-dimensional, each from its element `first` on.
  void split_part(
      const std::string& bfl,
      const at::Tensor& part,
      int64_t offset,
      const std::function<void(const std::string& name, int64_t first, const at::Tensor& elements)>&
          take) const;

 private:
  std::map<std::string, std::vector<Piece>> pieces_;
};

/// config.json of diffusers' FluxTransformer2DModel.
std::string diffusers_config_json(const Config& config);

}  // namespace flux::dit
