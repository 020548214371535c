// common/models/flux/transformer.h - the forward pass of FLUX.1, as pure functions of plain structs
// of tensors.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string_view>

#include "common/models/flux/config.h"
#include "common/models/flux/weights.h"

namespace flux::dit {

/// What the transformer reads. Floating-point tensors may have any float dtype: img, txt and y are
/// cast to the dtype of the weights; timestep, guidance and ids are used in float32.
struct Inputs {
  at::Tensor img;       // [B, N, in_channels] packed latents
  at::Tensor txt;       // [B, L, prompt_dim] prompt embedding
  at::Tensor y;         // [B, pooled_dim] pooled embedding
  at::Tensor timestep;  // [B] in [0, 1]
  at::Tensor guidance;  // [B]; read by a model with guidance only
  at::Tensor img_ids;   // [N, 3] or [B, N, 3]
  at::Tensor txt_ids;   // [L, 3] or [B, L, 3]
  std::optional<at::Tensor>
      text_mask;  // [B, L] bool or 0/1: 1 = real token; absent: all tokens are attended to
};

/// Rotation of each token, text first: [1 or B, L + N, head / 2] float32 (angles in float64).
struct Rope {
  at::Tensor cos, sin;
};

/// The two residual streams of a double block: img [B, N, H], txt [B, L, H].
struct Streams {
  at::Tensor img, txt;
};

/// Shows intermediate results to tests, by the names of the reference vectors: sinusoid_timestep,
/// sinusoid_guidance, vec, img_in, txt_in, rope_cos, rope_sin, double_blocks.{i}.img,
/// double_blocks.{i}.txt, single_blocks.{i} (text first), final_layer.modulated.
using Tap = std::function<void(std::string_view name, const at::Tensor& value)>;

/// The predicted velocity [B, N, out_channels], in the dtype of the weights. Gradients flow to img,
/// txt, y, all weights and adapters that require them. Throws std::invalid_argument, naming the
/// input and both shapes, if they disagree. Source: black-forest-labs/flux,
/// src/flux/model.py (precision: sinusoid from float32 times, then cast).
at::Tensor forward(const Config& config,
                   const Weights& weights,
                   const Inputs& inputs,
                   const Tap& tap = {});

// The parts of forward(), for loops that visit one block at a time.

/// Sinusoid of 1000 * values: [B] -> [B, dim] float32, cosines first.
at::Tensor sinusoid(const at::Tensor& values, int64_t dim);
/// Cosine and sine of the angles of ids [n, 3] or [B, n, 3].
Rope rope_table(const Config& config, const at::Tensor& ids);
/// vec [B, H] float32 (values of the weights' dtype): what modulates every block. float32, so that the
/// gradients of all blocks are summed in float32.
at::Tensor condition(const Config& config,
                     const Weights& weights,
                     const Inputs& inputs,
                     const Tap& tap = {});
/// Throws std::invalid_argument, as forward() does.
void check(const Config& config, const Inputs& inputs);
/// The streams at the first block, in the dtype of the weights.
Streams input_streams(const Weights& weights, const Inputs& inputs);
/// Which keys may be attended to, [B, L + N] bool; nothing without a text mask.
std::optional<at::Tensor> key_mask(const Inputs& inputs);
Streams double_block(const DoubleBlock& weights,
                     const Streams& streams,
                     const at::Tensor& vec,
                     const Rope& rope,
                     const std::optional<at::Tensor>& key_mask);
/// x [B, L + N, H], text first.
at::Tensor single_block(const SingleBlock& weights,
                        const at::Tensor& x,
                        const at::Tensor& vec,
                        const Rope& rope,
                        const std::optional<at::Tensor>& key_mask);
/// Image tokens [B, N, H] -> velocity [B, N, out_channels].
at::Tensor final_layer(const Weights& weights,
                       const at::Tensor& img,
                       const at::Tensor& vec,
                       const Tap& tap = {});

}  // namespace flux::dit
