// pipelines/model/convert_net.h - flux-model convert of an autoencoder or a text encoder, and what all conversions
// share.
#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <string>

#include "common/models/weights/weights.h"
#include "pipelines/model/convert.h"

namespace flux::model {

inline constexpr char kConvertedKey[] =
    "flux_stages.converted";  // in the metadata of what convert wrote
inline constexpr uint64_t kProgressUnit = 1000000;

/// `tensor` in `type`. Throws InputError, naming it, where values are too large for `type`, or were infinite or NaN
/// before.
at::Tensor narrowed(const at::Tensor& tensor,
                    c10::ScalarType type,
                    const std::string& name,
                    const std::filesystem::path& path);
/// Throws InputError if a value is infinite or NaN.
void require_finite(const at::Tensor& tensor,
                    const std::string& name,
                    const std::filesystem::path& path);

/// diffusers' name of a tensor of the autoencoder.
std::string vae_diffusers_name(const std::string& bfl, size_t num_levels);

/// convert() of a file that holds this net alone: kAutoEncoder, kT5 or kClip. One tensor at a time is in memory.
ConvertReport convert_net(const ConvertOptions& options, NetKind kind);

}  // namespace flux::model
