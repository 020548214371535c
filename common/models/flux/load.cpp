#include "common/models/flux/load.h"

#include <ATen/ops/cat.h>
#include <fmt/format.h>

#include <optional>
#include <set>
#include <string>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/models/flux/names.h"
#include "common/tensor/tensor.h"

namespace flux::dit {
namespace {

/// What read_config reads, under the names of one layout.
struct LayoutNames {
  const char *img_in, *txt_in, *time_in, *vector_in, *guidance_in, *mlp, *norm, *out,
      *double_blocks, *single_blocks;
};
constexpr LayoutNames kBfl{"img_in.weight",
                           "txt_in.weight",
                           "time_in.in_layer.weight",
                           "vector_in.in_layer.weight",
                           "guidance_in.in_layer.bias",
                           "double_blocks.0.img_mlp.0.weight",
                           "double_blocks.0.img_attn.norm.key_norm.scale",
                           "final_layer.linear.weight",
                           "double_blocks.",
                           "single_blocks."};
constexpr LayoutNames kDiffusers{"x_embedder.weight",
                                 "context_embedder.weight",
                                 "time_text_embed.timestep_embedder.linear_1.weight",
                                 "time_text_embed.text_embedder.linear_1.weight",
                                 "time_text_embed.guidance_embedder.linear_1.bias",
                                 "transformer_blocks.0.ff.net.0.proj.weight",
                                 "transformer_blocks.0.attn.norm_k.weight",
                                 "proj_out.weight",
                                 "transformer_blocks.",
                                 "single_transformer_blocks."};

bool is_diffusers(const NetTensors& net) {
  if (net.tensors.contains(kDiffusers.norm)) return true;
  if (net.tensors.contains(kBfl.norm)) return false;
  throw InputError(show(net.path) + ": not a FLUX transformer: neither " + kBfl.norm + " nor " +
                       kDiffusers.norm + " is there",
                   "give the transformer file, flux1-dev.safetensors for one");
}

/// Number of blocks, from the indices after `prefix`; every one below the largest must be there.
int64_t count_blocks(const NetTensors& net, const std::string& prefix) {
  std::set<int64_t> seen;
  for (auto it = net.tensors.lower_bound(prefix);
       it != net.tensors.end() && it->first.starts_with(prefix);
       ++it) {
    const auto digits =
        it->first.substr(prefix.size(), it->first.find('.', prefix.size()) - prefix.size());
    if (digits.empty() || digits.size() > 6 ||
        digits.find_first_not_of("0123456789") != std::string::npos)
      throw InputError(show(net.path) + ": tensor " + printable(it->first) +
                       " has no block index after " + prefix);
    seen.insert(std::stoll(digits));
  }
  for (int64_t i = 0; i < static_cast<int64_t>(seen.size()); ++i)
    if (!seen.contains(i))
      throw InputError(
          fmt::format(
              "{}: has {}{} but not {}{}", show(net.path), prefix, *seen.rbegin(), prefix, i),
          "the file is incomplete: download it again");
  return static_cast<int64_t>(seen.size());
}

int64_t length(const NetTensors& net, const char* name, int64_t dim, int64_t rank) {
  const auto it = net.tensors.find(name);
  if (it == net.tensors.end())
    throw InputError(show(net.path) + ": tensor " + name + " is missing");
  if (it->second.dim() != rank)
    throw InputError(fmt::format("{}: tensor {} has shape {}, expected {} dimensions",
                                 show(net.path),
                                 name,
                                 shape_text(it->second),
                                 rank));
  return it->second.size(dim);
}

at::Tensor swap_halves(const at::Tensor& rows) {
  const auto halves = rows.chunk(2, 0);
  return at::cat({halves[1], halves[0]}, 0);
}

ShapeMap shapes_of(const Config& config, bool diffusers) {
  ShapeMap out;
  if (diffusers) {
    for (const auto& tensor : diffusers_layout(config)) out[tensor.name] = tensor.shape;
  } else {
    for (const auto& tensor : tensor_shapes(config)) out[tensor.name] = tensor.shape;
  }
  return out;
}

}  // namespace

Config read_config(const NetTensors& net) {
  const auto& names = is_diffusers(net) ? kDiffusers : kBfl;
  Config c;
  c.hidden = length(net, names.img_in, 0, 2);
  c.in_channels = length(net, names.img_in, 1, 2);
  c.out_channels = length(net, names.out, 0, 2);
  c.prompt_dim = length(net, names.txt_in, 1, 2);
  c.pooled_dim = length(net, names.vector_in, 1, 2);
  c.sinusoid_dim = length(net, names.time_in, 1, 2);
  c.mlp = length(net, names.mlp, 0, 2);
  c.num_double_blocks = count_blocks(net, names.double_blocks);
  c.num_single_blocks = count_blocks(net, names.single_blocks);
  c.guidance = net.tensors.contains(names.guidance_in);
  const int64_t head = length(net, names.norm, 0, 1);
  if (head == 0 || c.hidden % head != 0)
    throw InputError(fmt::format(
        "{}: hidden size {} is no multiple of the head size {}", show(net.path), c.hidden, head));
  if (head % 32 != 0)
    throw InputError(fmt::format(
        "{}: head size {}: how it is split over rotation axes is known for multiples of 32 only",
        show(net.path),
        head));
  if (c.sinusoid_dim % 2 != 0)
    throw InputError(fmt::format("{}: sinusoid of odd size {}", show(net.path), c.sinusoid_dim));
  c.num_heads = c.hidden / head;
  c.axes = {head / 8, head / 16 * 7, head / 16 * 7};
  return c;
}

std::map<std::string, std::vector<CanonicalPart>> canonical_parts(const NetTensors& net,
                                                                  const Config& config) {
  const bool diffusers = is_diffusers(net);
  const auto tensors = expect_tensors(
      net.path, net_title(NetKind::kFlux), net.tensors, shapes_of(config, diffusers), {});
  std::map<std::string, std::vector<CanonicalPart>> parts;
  if (!diffusers) {
    for (const auto& [name, tensor] : tensors) parts[name] = {{tensor}};
    return parts;
  }
  for (const auto& entry : diffusers_layout(config)) {
    const auto& tensor = tensors.at(entry.name);
    auto& of_one = parts[entry.bfl];
    of_one.push_back({tensor, entry.swap_halves});
    if (of_one.front().tensor.scalar_type() != tensor.scalar_type())
      throw InputError(fmt::format("{}: {} is {}, but the part before it is {}",
                                   show(net.path),
                                   entry.name,
                                   c10::toString(tensor.scalar_type()),
                                   c10::toString(of_one.front().tensor.scalar_type())));
  }
  return parts;
}

TensorMap canonical_tensors(const NetTensors& net, const Config& config) {
  TensorMap out;
  for (const auto& [name, parts] : canonical_parts(net, config)) {
    std::vector<at::Tensor> rows;
    for (const auto& [tensor, swap] : parts) rows.push_back(swap ? swap_halves(tensor) : tensor);
    out[name] = rows.size() == 1 ? rows[0] : at::cat(rows, 0);
  }
  return out;
}

TensorMap to_diffusers(const Config& config, const TensorMap& canonical) {
  TensorMap out;
  for (const auto& entry : diffusers_layout(config)) {
    const auto rows = canonical.at(entry.bfl).narrow(0, entry.first_row, entry.num_rows());
    out[entry.name] = entry.swap_halves ? swap_halves(rows) : rows;
  }
  return out;
}

Weights make_weights(const Config& config,
                     const TensorMap& canonical,
                     c10::ScalarType dtype,
                     c10::Device device) {
  auto weights = empty_weights(config);
  for_each_tensor(weights, [&](const std::string& name, at::Tensor& tensor) {
    tensor = to_dtype(canonical.at(name), dtype).to(device);
  });
  return weights;
}

TensorMap named_tensors(const Weights& weights) {
  TensorMap out;
  auto copy = weights;  // of handles: the visit hands out references
  for_each_tensor(copy, [&](const std::string& name, at::Tensor& tensor) { out[name] = tensor; });
  return out;
}

Model load_model(const std::filesystem::path& path, c10::ScalarType dtype, c10::Device device) {
  Model model;
  auto net = take_net(read_weights(path), NetKind::kFlux);
  model.config = read_config(net);
  model.canonical = canonical_tensors(net, model.config);
  model.stamps = std::move(net.stamps);
  model.weights = make_weights(model.config, model.canonical, dtype, device);
  return model;
}

}  // namespace flux::dit
