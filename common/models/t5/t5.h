// common/models/t5/t5.h - the T5 v1.1 encoder (T5-XXL in FLUX): token ids -> prompt embedding.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <vector>

#include "common/models/weights/weights.h"

namespace flux::t5 {

/// Sizes, all read off a checkpoint in canonical names.
struct Config {
  int64_t width = 4096;  // d_model
  int64_t num_layers = 24;
  int64_t num_heads = 64;
  int64_t head_size = 64;  // d_kv
  int64_t mlp = 10240;     // d_ff
  int64_t vocabulary = 32128;

  /// Throws InputError if the sizes do not fit each other.
  static Config from_weights(const TensorMap& canonical, const std::filesystem::path& path);
};

/// The encoder's tensors by HF names, the token table as `shared.weight` alone, of what
/// take_net(file, NetKind::kT5) found. Accepts `shared`, `encoder.embed_tokens` or both, and a
/// whole T5 (`decoder.` and `lm_head.` are left out). Tensors keep their dtype (plain float8_e4m3
/// too) and share memory with the argument.
///
/// Throws InputError: umT5 (a bias table in every block), T5 v1.0 (an ungated MLP) or no T5 at all,
/// or missing, surplus or misshapen tensors, which are all listed. Source:
/// huggingface/transformers, models/t5/modeling_t5.py.
TensorMap canonical(const NetTensors& net);
/// Canonical names and shapes of all tensors of such a net.
ShapeMap tensor_shapes(const Config& config);

/// Rows of the relative position bias table: half for keys at or before the query, half for keys
/// after it.
inline constexpr int64_t kNumBuckets = 32;

/// Row of the relative position bias table for `relative` = key position - query position, 0..31:
/// an integer table of huggingface/transformers,
/// models/t5/modeling_t5.py (_relative_position_bucket), since a floating logarithm can land on the
/// wrong side of 16, 32 and 64.
int64_t relative_bucket(int64_t relative);

struct Layer {
  at::Tensor norm1, q, k, v,
      o;  // [width], [heads * head_size, width] x 3, [width, heads * head_size]
  at::Tensor norm2, wi_0, wi_1, wo;
};

/// Captions on their way through the layers.
struct Batch {
  /// One caption among the packed rows.
  struct Sample {
    int64_t begin = 0, rows = 0;
    at::Tensor live;  // [rows] int64: positions that are computed, if they are not the first ones
  };
  at::Tensor x;           // [R, width] float32: the residual stream
  int64_t tile_rows = 0;  // of a matrix product; R is a multiple
  int64_t length = 0;     // L
  bool masked = false;
  std::vector<Sample> samples;
};

/// Memory for what is between, for batches one after the other: fresh pages took an eighth of the time.
struct Scratch {
  at::Tensor q, k, v, y;  // [>= R, heads * head_size] in the dtype of the linear layers, as all
  at::Tensor n, out;      // [tile_rows, width]
  at::Tensor gate, up;    // [tile_rows, mlp]
  at::Tensor bias;        // [1, heads, L, L]
};

/// The network. Linear layers run in the load dtype, the residual stream, RMS norms and softmax in
/// float32 (in bfloat16 a residual stream of 24 layers loses what the later layers add). The bits of
/// a sample never depend on the batch it is in: attention runs sample by sample, and matrix products
/// have the same number of rows whatever is in them.
///
/// Layers are not part of it where they come one at a time (stream.h): then run_layer() is called with each.
struct Encoder {
  Config config;
  at::ScalarType dtype;  // of the linear layers
  at::Device device = at::kCPU;
  at::Tensor
      shared;  // [vocabulary, width]; in the dtype of the file (float8 in bfloat16): only looked up
  at::Tensor position_bias;  // [32, heads] float32
  std::vector<Layer> layers;
  at::Tensor final_norm;  // [width]

  /// Converts the weights (canonical) to `dtype` (float32 or bfloat16), tensor by tensor, dropping
  /// each from `weights` once it is converted; tensors that have `dtype` already stay where they
  /// are (a mapped file is not copied on CPU).
  static Encoder load(TensorMap weights,
                      const Config& config,
                      at::ScalarType dtype,
                      at::Device device);

  ///   ids      [B, L] int64, padded with 0; on any device
  ///   mask     [B, L], nonzero = may be attended to; undefined = all (FLUX's default: padding
  ///            attends too)
  ///   returns  [B, L, width] float32 on the device of the model, all positions, padding included
  ///
  /// With a mask only the live positions are computed, which saves their time, most of it in batches
  /// of several hundred live tokens; rows that are masked out are zero. Throws std::invalid_argument: shapes, an id outside the vocabulary, a row with
  /// nothing live.
  at::Tensor encode(const at::Tensor& ids, const at::Tensor& mask = {}) const;

  /// encode() in three parts.
  Batch begin(const at::Tensor& ids, const at::Tensor& mask = {}) const;
  void run_layer(const Layer& layer, Batch& batch, Scratch& scratch) const;
  at::Tensor finish(const Batch& batch) const;
  /// Bytes of a batch of `rows` rows, and of the scratch it needs.
  int64_t batch_bytes(int64_t rows) const { return rows * config.width * 4; }
  int64_t scratch_bytes(int64_t rows, int64_t length, bool masked) const;
};

// Parts of it, for checks against the reference.

/// x [L, width] float32 -> its RMS norm (eps 1e-6, no mean) in `dtype`; statistics and scale in
/// float32.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, at::ScalarType dtype);
/// Rows of the bias table [32, heads] for all pairs of `length` positions (query, key), as an
/// additive mask [1, heads, length, length] in `dtype`.
at::Tensor bias_of_length(const at::Tensor& table, int64_t length, at::ScalarType dtype);

}  // namespace flux::t5
