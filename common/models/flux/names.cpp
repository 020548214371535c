#include "common/models/flux/names.h"

#include <fmt/format.h>

#include <string_view>

namespace flux::dit {

std::vector<NamedShape> tensor_shapes(const Config& c) {
  const int64_t h = c.hidden, m = c.mlp;
  std::vector<NamedShape> out;
  const auto linear = [&](const std::string& name, int64_t rows, int64_t columns) {
    out.push_back({name + ".weight", {rows, columns}});
    out.push_back({name + ".bias", {rows}});
  };
  const auto norms = [&](const std::string& prefix) {
    out.push_back({prefix + "norm.query_norm.scale", {c.head_dim()}});
    out.push_back({prefix + "norm.key_norm.scale", {c.head_dim()}});
  };
  const auto embedder = [&](const std::string& name, int64_t columns) {
    linear(name + ".in_layer", h, columns);
    linear(name + ".out_layer", h, h);
  };

  linear("img_in", h, c.in_channels);
  embedder("time_in", c.sinusoid_dim);
  embedder("vector_in", c.pooled_dim);
  if (c.guidance) embedder("guidance_in", c.sinusoid_dim);
  linear("txt_in", h, c.prompt_dim);
  for (int64_t i = 0; i < c.num_double_blocks; ++i) {
    for (const char* stream : {"img", "txt"}) {
      const auto prefix = fmt::format("double_blocks.{}.{}_", i, stream);
      linear(prefix + "mod.lin", 6 * h, h);
      linear(prefix + "attn.qkv", 3 * h, h);
      norms(prefix + "attn.");
      linear(prefix + "attn.proj", h, h);
      linear(prefix + "mlp.0", m, h);
      linear(prefix + "mlp.2", h, m);
    }
  }
  for (int64_t i = 0; i < c.num_single_blocks; ++i) {
    const auto prefix = fmt::format("single_blocks.{}.", i);
    linear(prefix + "linear1", 3 * h + m, h);
    linear(prefix + "linear2", h, h + m);
    norms(prefix);
    linear(prefix + "modulation.lin", 3 * h, h);
  }
  linear("final_layer.linear", c.out_channels, h);
  linear("final_layer.adaLN_modulation.1", 2 * h, h);
  return out;
}

std::vector<DiffusersTensor> diffusers_layout(const Config& c) {
  const int64_t h = c.hidden, m = c.mlp;
  std::vector<DiffusersTensor> out;
  struct Place {
    std::string bfl;
    int64_t first_row = 0;
    bool swap_halves = false;
  };
  const auto linear =
      [&](const std::string& name, int64_t rows, int64_t columns, const Place& place) {
        out.push_back({name + ".weight",
                       place.bfl + ".weight",
                       place.first_row,
                       {rows, columns},
                       place.swap_halves});
        out.push_back(
            {name + ".bias", place.bfl + ".bias", place.first_row, {rows}, place.swap_halves});
      };
  const auto norms = [&](const std::string& name, const std::string& bfl) {
    out.push_back({name + "q.weight", bfl + "norm.query_norm.scale", 0, {c.head_dim()}});
    out.push_back({name + "k.weight", bfl + "norm.key_norm.scale", 0, {c.head_dim()}});
  };
  const auto embedder = [&](const std::string& name, const std::string& bfl, int64_t columns) {
    linear("time_text_embed." + name + "_embedder.linear_1", h, columns, {bfl + ".in_layer"});
    linear("time_text_embed." + name + "_embedder.linear_2", h, h, {bfl + ".out_layer"});
  };

  linear("x_embedder", h, c.in_channels, {"img_in"});
  linear("context_embedder", h, c.prompt_dim, {"txt_in"});
  embedder("timestep", "time_in", c.sinusoid_dim);
  embedder("text", "vector_in", c.pooled_dim);
  if (c.guidance) embedder("guidance", "guidance_in", c.sinusoid_dim);

  struct StreamNames {
    const char *bfl, *mod, *q, *k, *v, *norm, *proj, *mlp;
  };
  constexpr StreamNames kStreams[] = {
      {"img_", "norm1", "to_q", "to_k", "to_v", "norm_", "to_out.0", "ff"},
      {"txt_",
       "norm1_context",
       "add_q_proj",
       "add_k_proj",
       "add_v_proj",
       "norm_added_",
       "to_add_out",
       "ff_context"},
  };
  for (int64_t i = 0; i < c.num_double_blocks; ++i) {
    const auto to = fmt::format("transformer_blocks.{}.", i);
    for (const auto& s : kStreams) {
      const auto from = fmt::format("double_blocks.{}.{}", i, s.bfl);
      linear(to + s.mod + ".linear", 6 * h, h, {from + "mod.lin"});
      int64_t row = 0;
      for (const char* part : {s.q, s.k, s.v}) {
        linear(to + "attn." + part, h, h, {from + "attn.qkv", row});
        row += h;
      }
      norms(to + "attn." + s.norm, from + "attn.");
      linear(to + "attn." + s.proj, h, h, {from + "attn.proj"});
      linear(to + s.mlp + ".net.0.proj", m, h, {from + "mlp.0"});
      linear(to + s.mlp + ".net.2", h, m, {from + "mlp.2"});
    }
  }
  for (int64_t i = 0; i < c.num_single_blocks; ++i) {
    const auto to = fmt::format("single_transformer_blocks.{}.", i),
               from = fmt::format("single_blocks.{}.", i);
    linear(to + "norm.linear", 3 * h, h, {from + "modulation.lin"});
    int64_t row = 0;
    for (const char* part : {"to_q", "to_k", "to_v"}) {
      linear(to + "attn." + part, h, h, {from + "linear1", row});
      row += h;
    }
    linear(to + "proj_mlp", m, h, {from + "linear1", row});
    norms(to + "attn.norm_", from);
    linear(to + "proj_out", h, h + m, {from + "linear2"});
  }
  linear("norm_out.linear", 2 * h, h, {"final_layer.adaLN_modulation.1", 0, true});
  linear("proj_out", c.out_channels, h, {"final_layer.linear"});
  return out;
}

}  // namespace flux::dit
