#include "pipelines/check/transformer.h"

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include "common/core/error.h"
#include "common/models/flux/packing.h"

namespace flux::check {

const at::Tensor& golden(const TensorMap& vectors, const std::string& name) {
  const auto it = vectors.find(name);
  if (it == vectors.end()) throw InputError(fmt::format("the vectors hold no {}", name));
  return it->second;
}

dit::Model load_transformer(const Case& c, const std::filesystem::path& path) {
  return dit::load_model(path, c.dtype(), c.device);
}

dit::Inputs inputs_of(const Case& c, const TensorMap& vectors) {
  const auto input = [&](const char* name) {
    const auto it = vectors.find(std::string("input.") + name);
    return it == vectors.end() ? at::Tensor() : c.on_device(it->second);
  };
  dit::Inputs in;
  in.img = input("img");
  if (!in.img.defined()) {
    const at::Tensor latents = input("latents").defined() ? input("latents") : input("noise");
    if (latents.defined()) in.img = dit::pack_latents(latents);
  }
  in.txt = input("txt");
  in.y = input("y");
  in.timestep = input("timestep");
  in.guidance = input("guidance");
  in.img_ids = input("img_ids");
  in.txt_ids = input("txt_ids");
  if (!in.img.defined() || !in.txt.defined())
    throw InputError("the vectors hold no input.img or no input.txt");
  if (!in.img_ids.defined()) {
    const at::Tensor latents = golden(vectors, "input.latents");
    in.img_ids = c.on_device(dit::image_ids(latents.size(2), latents.size(3)));
  }
  if (!in.txt_ids.defined()) in.txt_ids = c.on_device(dit::text_ids(in.txt.size(1)));
  return in;
}

at::Tensor predict(const dit::Model& model, const dit::Inputs& inputs, const dit::Tap& tap) {
  const at::NoGradGuard no_grad;
  return dit::forward(model.config, model.weights, inputs, tap);
}

TensorMap make_leaves(dit::Weights& weights) {
  TensorMap leaves;
  dit::for_each_tensor(weights, [&](const std::string& name, at::Tensor& tensor) {
    tensor = tensor.detach().to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).requires_grad_();
    leaves.emplace(name, tensor);
  });
  return leaves;
}

}  // namespace flux::check
