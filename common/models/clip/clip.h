// common/models/clip/clip.h - the text half of CLIP-L: token ids -> pooled embedding.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "common/models/weights/weights.h"

namespace flux::clip {

/// Sizes, read off a checkpoint in canonical names. The number of heads leaves no trace in the
/// weights: it is that of the config.json beside them, if there is one, else hidden / 64.
struct Config {
  int64_t hidden = 768;
  int64_t num_layers = 12;
  int64_t num_heads = 12;
  int64_t mlp = 3072;
  int64_t num_positions = 77;
  int64_t vocabulary = 49408;
  int64_t eos_id =
      49407;  // the end token, at whose first place the pooled embedding is taken: the largest id

  /// `config_json`: HF's config.json (of the text model, or of a whole CLIP: `text_config`), or
  /// null if there is none. Only what weights cannot tell is taken from it; what contradicts the
  /// weights, or asks for another activation or epsilon than CLIP-L's, is an InputError.
  /// `eos_token_id` 2 is a known mistake in published files and is ignored. Throws InputError also
  /// for CLIP-G (1280 wide) and where the head size is in doubt.
  static Config from_weights(const TensorMap& canonical,
                             const nlohmann::json* config_json,
                             const std::filesystem::path& path);
};

/// The tensors of the text model, by HF names with `text_model.`, of what take_net(file,
/// NetKind::kClip) found. Accepts names without it and whole CLIP files (vision model and
/// projections are left out), and drops position_ids. Tensors keep their dtype and share memory
/// with the argument.
///
/// Throws InputError: CLIP-G or no CLIP at all, or missing, surplus or misshapen tensors, which are
/// all listed. Source: architecture notes 3.2.
TensorMap canonical(const NetTensors& net);
/// Canonical names and shapes of all tensors of such a net.
ShapeMap tensor_shapes(const Config& config);

/// Whether this is the config.json of a CLIP (text_config, a model_type of CLIP's, or its
/// architecture): others lie beside CLIP files too, a FLUX transformer's for one, and say nothing
/// about it.
bool is_clip_config(const nlohmann::json& config_json);

struct Affine {
  at::Tensor weight, bias;
};
struct Layer {
  Affine norm1, qkv, out, norm2, fc1,
      fc2;  // qkv: the three projections stacked, [3 hidden, hidden]
};
struct Output {
  at::Tensor pooled;             // [B, hidden] float32: last_hidden_state at the first end token
  at::Tensor last_hidden_state;  // [B, positions, hidden] float32, after the final norm
};

/// The network: causal, quick GELU, no projection. Samples run one by one, so that the bits of a
/// sample never depend on the batch it is in.
struct TextModel {
  Config config;
  at::ScalarType dtype;  // of the linear layers; norms and the residual stream are float32
  at::Tensor token_embedding, position_embedding;
  std::vector<Layer> layers;
  Affine final_norm;

  /// Converts the weights (canonical) to `dtype` (float32 or bfloat16), one by one, and moves them
  /// to `device`.
  static TextModel load(const TensorMap& weights,
                        const Config& config,
                        at::ScalarType dtype,
                        at::Device device);

  ///   ids      [B, L] int64, L at most num_positions (77 in FLUX), on any device; every row holds
  ///   the end token
  ///
  /// Throws std::invalid_argument: shape, an id outside the vocabulary, a row without end token.
  Output encode(const at::Tensor& ids) const;
};

// Parts of it, for checks against the reference.

/// x [L, hidden] float32 -> its LayerNorm (eps 1e-5) in `dtype`.
at::Tensor layer_norm(const at::Tensor& x, const Affine& norm, at::ScalarType dtype);
/// x sigmoid(1.702 x), computed in float32.
at::Tensor quick_gelu(const at::Tensor& x);

}  // namespace flux::clip
