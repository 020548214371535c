// common/models/vae/vae.h - the 16-channel FLUX AutoEncoder: image -> posterior of raw latents ->
// image.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <vector>

#include "common/models/vae/scale.h"
#include "common/models/weights/weights.h"

namespace flux::vae {

/// Raw latents -> latents, and back; any shape, in the dtype of the argument.
at::Tensor scale_latents(const at::Tensor& raw);
at::Tensor unscale_latents(const at::Tensor& latents);

/// Sizes, all read off a checkpoint in canonical names.
struct Config {
  int64_t channels = 128;  // of the widest image, "ch"
  std::vector<int64_t> channel_mult = {
      1, 2, 4, 4};             // per level; each level but the last halves the sides
  int64_t num_res_blocks = 2;  // per level of the encoder; the decoder has one more
  int64_t latent_channels = 16;
  int64_t image_channels = 3;
  bool has_encoder = true, has_decoder = true;  // which halves the checkpoint holds

  /// Pixels per latent, 8 for FLUX.
  int64_t stride() const { return int64_t{1} << (channel_mult.size() - 1); }
  /// Throws InputError: neither half is there, what tells its sizes is missing, or latents have
  /// other than 16 channels.
  static Config from_weights(const TensorMap& canonical, const std::filesystem::path& path);
};

/// The tensors of an AutoEncoder, in BFL names and shapes, of what take_net(file,
/// NetKind::kAutoEncoder) found: BFL or diffusers names (the oldest attention names too), both
/// halves or the encoder or the decoder alone. Tensors keep their dtype and share memory with the
/// argument.
///
/// Throws InputError: not a FLUX AutoEncoder (Stable Diffusion's has 4 channels, FLUX.2's 32), or
/// missing, surplus or misshapen tensors, which are all listed. Source: black-forest-labs/flux,
/// src/flux/modules/autoencoder.py.
TensorMap canonical(const NetTensors& net);
/// Canonical names and shapes of all tensors of such a net.
ShapeMap tensor_shapes(const Config& config);

/// The `encoder.` or `decoder.` tensors alone. The weights_sha256 of a latents cache covers the
/// first, so that a file of both halves and one of the encoder alone have the same identity. Throws
/// InputError if the file does not hold that half.
TensorMap encoder_half(const TensorMap& canonical, const std::filesystem::path& path);
TensorMap decoder_half(const TensorMap& canonical, const std::filesystem::path& path);

struct Conv {
  at::Tensor weight, bias;  // [co, ci, k, k], [co]
};
struct Norm {
  at::Tensor weight, bias;  // [c]
};
struct ResBlock {
  Norm norm1, norm2;
  Conv conv1, conv2,
      shortcut;  // shortcut.weight is undefined where input and output have as many channels
};
struct Attention {
  Norm norm;
  Conv q, k, v, out;
};
struct Level {
  std::vector<ResBlock> blocks;
  Conv resample;  // undefined in the last level to run
};

/// Mean and log-variance of the raw latents: [B, 16, H/8, W/8] float32, contiguous, on the device
/// of the model.
struct Posterior {
  at::Tensor mean, logvar;
};

/// Image -> posterior. Samples run one by one, so that the bits of a sample never depend on the
/// batch it is in (they decide the identity of a cached sample), and since a larger batch is slower
/// on CPU and one image fills a GPU.
struct Encoder {
  Config config;
  Conv conv_in;
  std::vector<Level> levels;
  ResBlock mid1, mid2;
  Attention attention;
  Norm norm_out;
  Conv conv_out;

  /// Takes the `encoder.` tensors of `weights` (canonical), converts them one by one to `dtype`
  /// (float32 or bfloat16) and moves them to `device`.
  static Encoder load(const TensorMap& weights,
                      const Config& config,
                      at::ScalarType dtype,
                      at::Device device);

  ///   pixels   [B, 3, H, W] in [-1, 1], any floating dtype and device; H and W multiples of
  ///            stride()
  ///   taps     if given: receives what each stage puts out for the first sample, float32, by the
  ///            names
  ///            conv_in, down.{l}.block.{b}, down.{l}.downsample, mid.block_1, mid.attn_1,
  ///            mid.block_2, norm_out, conv_out
  ///
  /// Throws std::invalid_argument naming the shape.
  Posterior encode(const at::Tensor& pixels, TensorMap* taps = nullptr) const;
};

/// Of one decode().
struct DecodeStats {
  int64_t scratch_bytes = 0;  // of all pictures that went to scratch files
};

/// How much of what is between the layers stays in memory.
struct DecodeMemory {
  int64_t picture_bytes = INT64_MAX;  // of pictures of activations; on the CPU only
  std::filesystem::path scratch{};    // folder, for those beyond
  DecodeStats* stats = nullptr;
};

/// Bytes of tensors while a picture is decoded.
struct DecodeNeeds {
  int64_t weights = 0;   // of the decoder
  int64_t mid = 0;       // pictures of the mid part, which are in memory always
  int64_t strips = 0;    // beside pictures of later levels
  int64_t pictures = 0;  // of later levels, if all are in memory
};

/// Raw latents -> image. Samples run one by one, as in Encoder.
struct Decoder {
  Config config;
  Conv conv_in;
  ResBlock mid1, mid2;
  Attention attention;
  std::vector<Level> levels;  // in BFL's numbering: the last one runs first
  Norm norm_out;
  Conv conv_out;

  static Decoder load(const TensorMap& weights,
                      const Config& config,
                      at::ScalarType dtype,
                      at::Device device);

  ///   raw      [B, 16, h, w] raw latents (see unscale_latents), any floating dtype and device
  ///   returns  [B, 3, 8 h, 8 w] float32 on the device of the model; about -1 to 1, not clamped
  ///
  /// Only the mid part, which attends to all pixels, needs a whole picture of activations: after it everything is computed
  /// in strips of rows, with GroupNorm's statistics of the whole picture. Throws ResourceError for a scratch file.
  at::Tensor decode(const at::Tensor& raw, const DecodeMemory& memory = {}) const;
  /// What memory such a picture takes, of pictures of activations in memory and all else, weights included.
  DecodeNeeds needs(int64_t h, int64_t w) const;
};

/// GroupNorm of 32 groups, eps 1e-6: x [B, c, h, w]. For checks against the reference.
at::Tensor normalise(const at::Tensor& x, const Norm& norm);

}  // namespace flux::vae
