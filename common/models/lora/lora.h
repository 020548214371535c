// common/models/lora/lora.h - low-rank adapters of the FLUX transformer.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/models/flux/config.h"
#include "common/models/flux/weights.h"
#include "common/models/lora/selection.h"
#include "common/tensor/fwd.h"

namespace flux::lora {

/// One adapted Linear; the tensors as at LowRank.
struct Module {
  std::string path;  // BFL module path
  at::Tensor down, up;
  double alpha = 1;
  at::Tensor mix{}, magnitude{};

  int64_t rank() const { return down.size(0); }
  /// alpha / rank; 1 where LoKr's matrices have no rank, as in LyCORIS.
  double scale() const;
  /// By place in kAdapterParts.
  std::array<at::Tensor*, 4> parts() { return {&down, &up, &mix, &magnitude}; }
  std::array<const at::Tensor*, 4> parts() const { return {&down, &up, &mix, &magnitude}; }
};

/// An adapter file or a LoRA in training. Modules are in the order of all_targets().
struct Adapters {
  std::vector<Module> modules;
  int64_t num_parameters() const;
};

/// New adapters in float32: down and mix uniform in +-1/sqrt(columns) (Kaiming with a = sqrt(5)), from streams
/// keyed by seed and module path, so that a module's start does not depend on which others are
/// trained; up zero, and down where there is no up. Magnitudes are one until set_magnitude().
Adapters make_adapters(const std::vector<Target>& targets, uint64_t seed, const Form& form = {});

/// The same shapes without values, on `device`: for plans on Meta.
Adapters empty_adapters(const std::vector<Target>& targets,
                        at::Device device,
                        const Form& form = {});

/// DoRA's start: the magnitudes of the layer's adapter, if it has some, are the norms of the rows of its weight, so that the
/// layer does what it did. `type`: of the products.
void set_magnitude(const Linear& layer, at::ScalarType type);

/// Puts the adapters into the Linears of `weights` (the tensors are shared, so training them trains
/// what is attached). Throws InputError, naming the module and both shapes, if one does not fit;
/// std::invalid_argument for magnitudes with another multiplier than 1, which merge() knows.
void attach(const Adapters& adapters, dit::Weights& weights, double multiplier = 1);
void detach(dit::Weights& weights);
/// The same beside what is attached already, for computing without gradients: what the adapters do to a layer alone, times
/// `multiplier`, is added; magnitudes may have one. detach() takes these away too. Throws InputError, as attach() does.
void attach_beside(const Adapters& adapters, dit::Weights& weights, double multiplier = 1);

/// W <- W + multiplier * delta for every adapted Linear, with magnitudes W + multiplier * (scaled W + delta - W), computed in
/// float32 and rounded once to the dtype of W. New tensors: those of `weights` that others share stay as they
/// were.
void merge(const Adapters& adapters, dit::Weights& weights, double multiplier = 1);

/// Scales down, up and mix by one factor so that the Frobenius norm of delta is at most `max_norm`; one below
/// it keeps its bits. In place; on Meta it allocates what it does elsewhere. Source: kohya-ss/sd-scripts,
/// apply_max_norm_regularization.
void limit_norm(const Module& module, double max_norm);

using Metadata = std::map<std::string, std::string>;

/// The tensors of sd-scripts' layout: lora_unet_{path with underscores}.lora_down.weight,
/// .lora_up.weight, .alpha (0-dim), all in `dtype`. Of LoKr those of LyCORIS: .lokr_w1 is mix, .lokr_w2_a up, .lokr_w2_b
/// down, or .lokr_w2 down where there is no up. Magnitudes are .dora_scale [out, 1], in float32: a bfloat16 one is as far off
/// as training moves it.
TensorMap to_kohya(const Adapters& adapters, at::ScalarType dtype);

/// Adapters from the tensors of a file of any layout that layouts.h knows, q, k and v fused. Tensors keep their dtype,
/// unless a scale that differs between fused parts goes into them. Throws InputError, naming the tensor or the layer: what
/// AdapterFile refuses, and what has no place in Adapters (full differences, biases, replaced norms, adapters of text
/// encoders, embeddings).
Adapters from_tensors(const TensorMap& tensors,
                      const Metadata& metadata,
                      const dit::Config& config);

}  // namespace flux::lora
