// common/models/flux/load.h - a FLUX transformer out of a weight file, and its tensors in either
// layout.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "common/models/flux/config.h"
#include "common/models/flux/weights.h"
#include "common/models/weights/weights.h"

namespace flux::dit {

/// Reads depth, widths and guidance off names and shapes, in the BFL or the diffusers layout. The
/// rotation axes are not stored: 1/8, 7/16 and 7/16 of the head size (16, 56, 56 for 128). Throws
/// InputError: neither layout; a block index missing; sizes that do not fit together. Source:
/// huggingface/diffusers, scripts/convert_flux_to_diffusers.py.
Config read_config(const NetTensors& net);

/// The tensors under their BFL names, in the dtypes of the file, checked against
/// tensor_shapes(config). Parts that the diffusers layout splits are joined (copied); everything
/// else is as it was. Throws InputError that lists missing, surplus and misshapen tensors under the
/// names of the file.
TensorMap canonical_tensors(const NetTensors& net, const Config& config);

/// What a BFL tensor is made of in a file: one tensor, or several whose rows follow each other.
struct CanonicalPart {
  at::Tensor tensor;         // as in the file
  bool swap_halves = false;  // the second half of its rows comes first
};
/// canonical_tensors() before anything is joined: by BFL name, in the order of rows. Reads no
/// values. Throws InputError, as that does.
std::map<std::string, std::vector<CanonicalPart>> canonical_parts(const NetTensors& net,
                                                                  const Config& config);

/// The diffusers layout of `canonical`: every tensor a view, but for the swapped last modulation.
TensorMap to_diffusers(const Config& config, const TensorMap& canonical);

/// Weights from canonical tensors in `dtype` on `device`. A tensor that needs no change is not
/// copied: it may be a read-only view of the file, so training the weights themselves needs copies.
Weights make_weights(const Config& config,
                     const TensorMap& canonical,
                     c10::ScalarType dtype,
                     c10::Device device = c10::Device(c10::DeviceType::CPU));
/// The inverse: every base tensor by its BFL name.
TensorMap named_tensors(const Weights& weights);

/// A model file as the tools need it.
struct Model {
  Config config;
  TensorMap canonical;  // as stored; for weights_sha256. May be cleared to let go of joined copies
  std::vector<FileStamp> stamps;  // of its files
  Weights weights;
};

/// read_weights, take_net, read_config, canonical_tensors and make_weights. Throws InputError, as
/// those do.
Model load_model(const std::filesystem::path& path,
                 c10::ScalarType dtype,
                 c10::Device device = c10::Device(c10::DeviceType::CPU));

}  // namespace flux::dit
