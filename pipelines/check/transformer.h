// pipelines/check/transformer.h - what the kinds flux, lora, train and euler share: the model and
// its inputs.
#pragma once
#include <ATen/core/Tensor.h>

#include "common/models/flux/load.h"
#include "common/models/flux/transformer.h"
#include "common/tensor/fwd.h"
#include "pipelines/check/case.h"

namespace flux::check {

/// The golden tensor `name`; throws InputError that names the file's lack of it.
const at::Tensor& golden(const TensorMap& vectors, const std::string& name);
/// The model that the case leans on, in the case's precision and on its device.
dit::Model load_transformer(const Case& c, const std::filesystem::path& path);
/// `input.*` of a vectors file, on the case's device; packed latents and positions are made from
/// input.latents (or input.noise, where a sampling run starts) if they are not there.
dit::Inputs inputs_of(const Case& c, const TensorMap& vectors);
/// Output without gradients.
at::Tensor predict(const dit::Model& model, const dit::Inputs& inputs, const dit::Tap& tap = {});
/// Replaces every weight by a float32 leaf of its own that requires a gradient; returns them by
/// name.
TensorMap make_leaves(dit::Weights& weights);

}  // namespace flux::check
