// common/data/stored_picture.h - a sampled picture as samples.h5 holds it.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "common/data/prompts.h"
#include "formats/samples/samples.h"

namespace flux {

/// `latents` [1, 16, h, w], shifted and scaled as the transformer has them; the file has them unscaled.
///   index     of the pictures of this prompt
///   negative  the prompt that was led away from; empty: none
samples::Record stored_picture(const at::Tensor& latents,
                               const Prompt& prompt,
                               int64_t index,
                               int64_t seed,
                               const std::string& negative);

}  // namespace flux
