// Kind flux: weights in both layouts, forward passes with intermediate results, masks, gradients.
#include <ATen/ops/cat.h>
#include <ATen/ops/scalar_tensor.h>
#include <fmt/format.h>

#include <vector>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/models/flux/packing.h"
#include "common/tensor/tensor.h"
#include "common/train/gradient_clip.h"
#include "pipelines/check/case.h"
#include "pipelines/check/transformer.h"

namespace flux::check {
namespace {

constexpr const char* kBfl = "weights_bfl.safetensors";
constexpr const char* kDiffusers = "weights_diffusers.safetensors";
constexpr const char* kDiffusersForward = "forward_diffusers.safetensors";

std::string sha256_of(const at::Tensor& tensor) {
  const at::Tensor host = tensor.cpu().contiguous();
  return to_hex(sha256(host_bytes(host)));
}

/// What config.json says against what was read off the weights.
void check_config(const Case& c, const dit::Config& config) {
  const std::pair<const char*, int64_t> kFields[] = {
      {"in_channels", config.in_channels},
      {"out_channels", config.out_channels},
      {"vec_in_dim", config.pooled_dim},
      {"context_in_dim", config.prompt_dim},
      {"hidden_size", config.hidden},
      {"num_heads", config.num_heads},
      {"depth", config.num_double_blocks},
      {"depth_single_blocks", config.num_single_blocks},
      {"guidance_embed", config.guidance},
      {"parameters", config.num_parameters()}};
  for (const auto& [name, value] : kFields) {
    if (!c.config.contains(name)) continue;
    const auto& field = c.config[name];
    const int64_t wanted = field.is_boolean() ? field.get<bool>() : field.get<int64_t>();
    if (wanted != value)
      return c.report->verdict(
          "config", false, fmt::format("{} {}, golden {}", name, value, wanted));
  }
  c.report->verdict("config", true, config.describe());
}

/// layout.json: every diffusers tensor by its hash, and the way back bit for bit.
void check_layout(const Case& c, const TensorMap& canonical, const dit::Config& config) {
  const auto entries = nlohmann::json::parse(read_file(c.folder / "layout.json"));
  TensorMap diffusers = dit::to_diffusers(config, canonical);
  for (const auto& entry : entries) {
    const std::string name = entry.at("diffusers");
    const auto it = diffusers.find(name);
    if (it == diffusers.end()) {
      c.report->verdict("layout " + name, false, "not among the tensors of our diffusers layout");
      continue;
    }
    const bool same = it->second.sizes().vec() == entry.at("shape").get<std::vector<int64_t>>() &&
                      sha256_of(it->second) == entry.at("sha256").get<std::string>();
    c.report->verdict("layout " + name, same, same ? "exact" : "other bytes or shape");
  }
  c.report->verdict("layout",
                    diffusers.size() == entries.size(),
                    fmt::format("{} tensors, golden {}", diffusers.size(), entries.size()));
  const NetTensors net{c.folder / kBfl, {}, "", std::move(diffusers), {}};
  const TensorMap back = dit::canonical_tensors(net, dit::read_config(net));
  bool same = back.size() == canonical.size();
  for (const auto& [name, tensor] : canonical)
    same = same && back.contains(name) && sha256_of(back.at(name)) == sha256_of(tensor);
  c.report->verdict("layout to diffusers and back", same, same ? "exact" : "not equal");
}

/// A file of the diffusers layout by the hashes of layout.json, as far as both go.
void check_hashes(const Case& c, const std::string& file) {
  const TensorMap tensors = c.read_tensors(file);
  for (const auto& entry : nlohmann::json::parse(read_file(c.folder / "layout.json"))) {
    const std::string name = entry.at("diffusers");
    const auto it = tensors.find(name);
    if (it == tensors.end()) continue;
    const bool same = sha256_of(it->second) == entry.at("sha256").get<std::string>();
    c.report->verdict("layout " + name, same, same ? "exact" : "other bytes");
  }
}

/// Each sample alone, with its masked text cut off.
at::Tensor predict_trimmed(const dit::Model& model, const dit::Inputs& in, const at::Tensor& mask) {
  std::vector<at::Tensor> rows;
  for (int64_t i = 0; i < mask.size(0); ++i) {
    const int64_t length = mask[i].sum().item<int64_t>();
    const auto row = [&](const at::Tensor& t) { return t.defined() ? t.narrow(0, i, 1) : t; };
    dit::Inputs one{row(in.img),
                    row(in.txt).narrow(1, 0, length),
                    row(in.y),
                    row(in.timestep),
                    row(in.guidance),
                    in.img_ids,
                    in.txt_ids.narrow(0, 0, length),
                    {}};
    rows.push_back(predict(model, one));
  }
  return at::cat(rows);
}

/// One forward_*.safetensors.
void check_forward(const Case& c,
                   const dit::Model& model,
                   const std::string& file,
                   const TensorMap& v) {
  const dit::Inputs in = inputs_of(c, v);
  const std::string label = file.substr(0, file.find('.')) + " ";
  if (!c.bf16 && v.contains("input.latents")) {
    const at::Tensor& latents = v.at("input.latents");
    if (v.contains("input.img"))
      c.report->equal(label + "input.img", dit::pack_latents(latents), v.at("input.img"));
    if (v.contains("input.img_ids")) {
      c.report->equal(label + "input.img_ids",
                      dit::image_ids(latents.size(2), latents.size(3)),
                      v.at("input.img_ids"));
    }
  }
  TensorMap taps;
  const at::Tensor output = predict(model, in, [&](std::string_view name, const at::Tensor& value) {
    taps.insert_or_assign("tap." + std::string(name), value);
  });
  if (v.contains("output")) c.output(label + "output", output, v.at("output"));
  if (v.contains("mask.text")) {
    dit::Inputs masked = in;
    masked.text_mask = c.on_device(v.at("mask.text"));
    if (v.contains("mask.output"))
      c.output(label + "mask.output", predict(model, masked), v.at("mask.output"));
    if (v.contains("mask.output_trimmed")) {
      c.output(label + "mask.output_trimmed",
               predict_trimmed(model, in, v.at("mask.text")),
               v.at("mask.output_trimmed"));
    }
  }
  if (c.bf16) return;
  for (const auto& [name, wanted] : v) {
    if (!name.starts_with("tap.")) continue;
    const auto tap = taps.find(name);
    if (tap == taps.end()) {
      c.report->verdict(label + name, false, "not among our intermediate results");
    } else {
      // a rotation table of one row serves all samples
      const at::Tensor& mine = tap->second;
      c.inner(label + name,
              mine.dim() == wanted.dim() + 1 && mine.size(0) == 1 ? mine.squeeze(0) : mine,
              wanted,
              c.limits());
    }
  }
}

void check_gradients(const Case& c,
                     const std::filesystem::path& weights,
                     const std::string& file,
                     const TensorMap& forward) {
  const TensorMap g = c.read_tensors(file);
  const Limits within = c.limits("gradients");
  const std::string label = file.substr(0, file.find('.')) + " ";
  dit::Model model = load_transformer(c, weights);
  const TensorMap leaves = make_leaves(model.weights);
  dit::Inputs in = inputs_of(c, forward);
  for (at::Tensor* input : {&in.img, &in.txt, &in.y}) *input = input->clone().requires_grad_();
  const at::Tensor loss =
      (dit::forward(model.config, model.weights, in) - c.on_device(golden(g, "target")))
          .square()
          .mean();
  loss.backward();
  if (g.contains("loss")) c.inner(label + "loss", loss, g.at("loss"), within);
  for (const auto& [name, input] :
       {std::pair("grad_input.img", in.img), {"grad_input.txt", in.txt}, {"grad_input.y", in.y}}) {
    if (g.contains(name)) c.inner(label + name, input.grad(), g.at(name), within);
  }
  std::vector<at::Tensor> gradients;
  for (const auto& [name, leaf] : leaves) {
    gradients.push_back(leaf.grad());
    c.summary(g, "grad", name, leaf.grad(), within, true);
  }
  if (g.contains("grad_norm")) {
    c.inner(
        label + "grad_norm", at::scalar_tensor(global_norm(gradients)), g.at("grad_norm"), within);
  }
}

}  // namespace

void check_flux(const Case& c) {
  std::vector<std::pair<std::string, TensorMap>> forwards;
  for (const std::string& file : c.files("forward_", ".safetensors")) {
    if (file != kDiffusersForward) forwards.emplace_back(file, c.read_tensors(file));
  }
  // the diffusers file holds fewer blocks, and then has a forward pass of its own; without the
  // other it may be the model
  const bool only_diffusers = !c.has(kBfl) && !c.json.contains("model") && c.has(kDiffusers);
  const auto path = c.required("model", only_diffusers ? kDiffusers : kBfl);
  const dit::Model model = load_transformer(c, path);
  const auto depth_is = [&](const char* key, int64_t depth) {
    return !c.config.contains(key) || c.config[key] == depth;
  };
  if (!only_diffusers || (depth_is("depth", model.config.num_double_blocks) &&
                          depth_is("depth_single_blocks", model.config.num_single_blocks))) {
    if (!c.bf16) {
      check_config(c, model.config);
      if (c.has("layout.json")) check_layout(c, model.canonical, model.config);
    }
    for (const auto& [file, vectors] : forwards) {
      check_forward(c, model, file, vectors);
      const std::string gradients = "gradients_" + file.substr(std::string_view("forward_").size());
      if (!c.bf16 && c.has(gradients)) check_gradients(c, path, gradients, vectors);
    }
  }
  if (!c.bf16 && !only_diffusers && c.has(kDiffusers)) {  // the same values in the other layout
    const dit::Model other = load_transformer(c, c.folder / kDiffusers);
    for (const auto& [name, tensor] : other.canonical) {
      const auto it = model.canonical.find(name);
      if (it != model.canonical.end())
        c.report->equal("diffusers " + name, tensor, it->second);
      else
        c.report->verdict("diffusers " + name, false, "not in the BFL file");
    }
  }
  if (!c.bf16 && only_diffusers && c.has("layout.json")) check_hashes(c, kDiffusers);
  if (c.has(kDiffusers) && c.has(kDiffusersForward)) {
    const TensorMap wanted = c.read_tensors(kDiffusersForward);
    const at::Tensor& output = golden(wanted, "output");
    // it belongs to the inputs of the forward pass that has intermediate results; without one, to
    // the first that fits
    const TensorMap* inputs = wanted.contains("input.img") ? &wanted : nullptr;
    for (const auto& [file, vectors] : forwards) {
      const bool fits =
          vectors.contains("output") && vectors.at("output").sizes() == output.sizes();
      if (fits && (!inputs || (vectors.contains("tap.vec") && !inputs->contains("tap.vec"))))
        inputs = &vectors;
    }
    if (!inputs)
      throw InputError(
          fmt::format("{}: no forward pass holds the inputs of {}", c.title, kDiffusersForward));
    c.output("forward_diffusers output",
             predict(load_transformer(c, c.folder / kDiffusers), inputs_of(c, *inputs)),
             output);
  }
}

}  // namespace flux::check
