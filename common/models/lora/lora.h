// common/models/lora/lora.h - low-rank adapters of the FLUX transformer.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/models/flux/config.h"
#include "common/models/flux/weights.h"
#include "common/models/lora/selection.h"
#include "common/tensor/fwd.h"

namespace flux::lora {

/// One adapted Linear: W + multiplier * alpha / rank * up @ down.
struct Module {
  std::string path;  // BFL module path
  at::Tensor down;   // [rank, in]
  at::Tensor up;     // [out, rank]
  double alpha = 1;
  int64_t rank() const { return down.size(0); }
};

/// An adapter file or a LoRA in training. Modules are in the order of all_targets().
struct Adapters {
  std::vector<Module> modules;
  int64_t num_parameters() const;
};

/// New adapters in float32: down uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5)), from a stream
/// keyed by seed and module path, so that a module's start does not depend on which others are
/// trained; up zero.
Adapters make_adapters(const std::vector<Target>& targets, uint64_t seed);

/// The same shapes without values, on `device`: for plans on Meta.
Adapters empty_adapters(const std::vector<Target>& targets, at::Device device);

/// Puts the adapters into the Linears of `weights` (the tensors are shared, so training them trains
/// what is attached). Throws InputError, naming the module and both shapes, if one does not fit.
void attach(const Adapters& adapters, dit::Weights& weights, double multiplier = 1);
void detach(dit::Weights& weights);

/// W <- W + multiplier * alpha / rank * up @ down for every adapted Linear, computed in float32 and
/// rounded once to the dtype of W. New tensors: those of `weights` that others share stay as they
/// were.
void merge(const Adapters& adapters, dit::Weights& weights, double multiplier = 1);

/// Scales down and up by one factor so that the Frobenius norm of alpha / rank * up @ down is at most `max_norm`; one below
/// it keeps its bits. In place; on Meta it allocates what it does elsewhere. Source: kohya-ss/sd-scripts,
/// apply_max_norm_regularization.
void limit_norm(const Module& module, double max_norm);

using Metadata = std::map<std::string, std::string>;

/// The tensors of sd-scripts' layout: lora_unet_{path with underscores}.lora_down.weight,
/// .lora_up.weight, .alpha (0-dim), all in `dtype`.
TensorMap to_kohya(const Adapters& adapters, at::ScalarType dtype);

/// Adapters from the tensors of a file, whichever of these layouts it has (recognised by its
/// names):
///   sd-scripts      lora_unet_* with .lora_down.weight, .lora_up.weight, .alpha
///   BFL paths       diffusion_model.* or base_model.model.* with .lora_down/.lora_up or
///                   .lora_A/.lora_B
///   diffusers/PEFT  transformer.* with .lora_A.weight, .lora_B.weight; q, k, v (and the MLP half
///                   of linear1) are fused exactly: downs stacked, ups on the diagonal,
///                   alpha = fused rank. The scale is 1, or
///                   lora_alpha / r of the metadata `lora_adapter_metadata` (with its patterns),
///                   folded into the ups if it differs between parts
/// Tensors keep their dtype. Throws InputError, naming the tensor, for a module the model lacks, a
/// wrong shape, a half pair, or a kind not supported (LyCORIS, DoRA, full differences, biases,
/// XLabs processors, adapters of text encoders). Source: huggingface/diffusers,
/// loaders/lora_conversion_utils.py.
Adapters from_tensors(const TensorMap& tensors,
                      const Metadata& metadata,
                      const dit::Config& config);

}  // namespace flux::lora
