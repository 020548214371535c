// common/models/vae/scale.h - between raw latents, which the AutoEncoder knows, and latents, which the transformer knows.
#pragma once

namespace flux::vae {

/// latents = kScale * (raw latents - kShift). Source: black-forest-labs/flux, src/flux/util.py.
inline constexpr double kScale = 0.3611, kShift = 0.1159;

}  // namespace flux::vae
