// Kind ops: single operations and their gradients, each by the function that the networks call.
#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <functional>
#include <string>
#include <vector>

#include "common/models/clip/clip.h"
#include "common/models/flux/packing.h"
#include "common/models/flux/transformer.h"
#include "common/models/t5/t5.h"
#include "common/models/vae/vae.h"
#include "common/ops/attention.h"
#include "common/ops/modulate.h"
#include "common/ops/qk_norm_rope.h"
#include "pipelines/check/case.h"
#include "pipelines/check/transformer.h"

namespace flux::check {
namespace {

using Tensors = std::vector<at::Tensor>;

/// The norm of q alone: no rotation, one head.
at::Tensor qk_norm(const at::Tensor& x, const at::Tensor& weight) {
  const auto options = x.options().requires_grad(false);
  const int64_t rows = x.size(0), head = x.size(1);
  const at::Tensor idle = at::zeros({1, rows, 2 * head}, options);
  return qk_norm_rope(at::cat({x.unsqueeze(0), idle}, 2),
                      weight,
                      at::ones({head}, options),
                      at::ones({1, rows, head / 2}, options),
                      at::zeros({1, rows, head / 2}, options))
      .q.view({rows, head});
}

/// The rotation of q [1, N, heads, head] alone: what the norm takes off a row is put back, since
/// rotation is linear.
at::Tensor rotate(const at::Tensor& q, const at::Tensor& cos, const at::Tensor& sin) {
  constexpr double kEps = 1e-6;
  const int64_t tokens = q.size(1), width = q.size(2) * q.size(3);
  const at::Tensor packed =
      at::cat({q.reshape({1, tokens, width}), at::zeros({1, tokens, 2 * width}, q.options())}, 2);
  const at::Tensor one = at::ones({q.size(3)}, q.options());
  return qk_norm_rope(packed, one, one, cos, sin, kEps).q *
         (q.square().mean(-1, true) + kEps).sqrt();
}

/// [B, heads, N, head] of the vectors and [B, N, heads, head] of the operation.
at::Tensor attend(const Tensors& x, const std::optional<at::Tensor>& mask) {
  const auto swap = [](const at::Tensor& t) { return t.transpose(1, 2); };
  return swap(attention(swap(x[0]), swap(x[1]), swap(x[2]), mask)
                  .view({x[0].size(0), x[0].size(2), x[0].size(1), x[0].size(3)}));
}

struct Operation {
  const char* name;
  std::vector<const char*> inputs;
  std::function<at::Tensor(const Tensors& x)> run;
};

void check_operation(const Case& c, const TensorMap& v, const Operation& operation) {
  const std::string p = std::string(operation.name) + ".";
  if (!v.contains(p + "output")) return;
  Tensors inputs;
  for (const char* name : operation.inputs) {
    inputs.push_back(
        c.on_device(golden(v, p + name)).clone().requires_grad_(v.contains(p + "grad_" + name)));
  }
  const at::Tensor output = operation.run(inputs);
  c.inner(p + "output", output, v.at(p + "output"), c.limits());
  if (!v.contains(p + "grad_output")) return;
  output.backward(c.on_device(v.at(p + "grad_output")));
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string name = p + "grad_" + operation.inputs[i];
    if (v.contains(name)) c.inner(name, inputs[i].grad(), v.at(name), c.limits());
  }
}

}  // namespace

void check_ops(const Case& c) {
  const TensorMap v = c.read_tensors("vectors.safetensors");
  const auto mask = [&] { return c.on_device(golden(v, "attention_masked.mask")).to(at::kBool); };
  const auto table = [&](const char* name) { return c.on_device(golden(v, name)).unsqueeze(0); };
  const Operation kOperations[] = {
      {"layer_norm_dit", {"x"}, [](const Tensors& x) { return layer_norm(x[0]); }},
      {"layer_norm_clip",
       {"x", "weight", "bias"},
       [](const Tensors& x) {
         return clip::layer_norm(x[0], {x[1], x[2]}, at::kFloat);
       }},
      {"rms_norm_qk", {"x", "weight"}, [](const Tensors& x) { return qk_norm(x[0], x[1]); }},
      {"rms_norm_t5",
       {"x", "weight"},
       [](const Tensors& x) { return t5::rms_norm(x[0], x[1], at::kFloat); }},
      {"group_norm",
       {"x", "weight", "bias"},
       [](const Tensors& x) {
         return vae::normalise(x[0], {x[1], x[2]});
       }},
      {"gelu_tanh", {"x"}, [](const Tensors& x) { return at::gelu(x[0], "tanh"); }},
      {"gelu_new_t5", {"x"}, [](const Tensors& x) { return at::gelu(x[0], "tanh"); }},
      {"quick_gelu", {"x"}, [](const Tensors& x) { return clip::quick_gelu(x[0]); }},
      {"silu", {"x"}, [](const Tensors& x) { return at::silu(x[0]); }},
      {"modulate",
       {"x", "shift", "scale"},
       [](const Tensors& x) { return modulate(x[0], x[1].unsqueeze(1), x[2].unsqueeze(1)); }},
      {"gated_add",
       {"x", "gate", "y"},
       [](const Tensors& x) { return gated_residual(x[0], x[1].unsqueeze(1), x[2]); }},
      {"attention", {"q", "k", "v"}, [](const Tensors& x) { return attend(x, std::nullopt); }},
      {"attention_masked", {"q", "k", "v"}, [&](const Tensors& x) { return attend(x, mask()); }},
      {"rope.apply",
       {"q"},
       [&](const Tensors& x) { return rotate(x[0], table("rope.cos"), table("rope.sin")); }},
      // sinusoid.output_t_in_bfloat16 shows what rounding the time first would give; nothing here
      // does that
      {"sinusoid", {"t"}, [](const Tensors& x) { return dit::sinusoid(x[0], 256); }},
  };
  for (const Operation& operation : kOperations) check_operation(c, v, operation);
  if (v.contains("rope.ids")) {
    const dit::Rope rope = dit::rope_table(dit::Config{}, c.on_device(v.at("rope.ids")));
    if (v.contains("rope.cos"))
      c.inner("rope.cos", rope.cos.squeeze(0), v.at("rope.cos"), c.limits());
    if (v.contains("rope.sin"))
      c.inner("rope.sin", rope.sin.squeeze(0), v.at("rope.sin"), c.limits());
  }
  if (v.contains("pack.latents")) {
    const at::Tensor& latents = v.at("pack.latents");
    if (v.contains("pack.tokens")) {
      c.report->equal("pack.tokens", dit::pack_latents(latents), v.at("pack.tokens"));
      c.report->equal("pack.latents",
                      dit::unpack_latents(v.at("pack.tokens"), latents.size(2), latents.size(3)),
                      latents);
    }
    if (v.contains("pack.img_ids"))
      c.report->equal(
          "pack.img_ids", dit::image_ids(latents.size(2), latents.size(3)), v.at("pack.img_ids"));
  }
}

}  // namespace flux::check
