// common/models/weights/weights.h - what all nets share when they take their weights out of a file,
// by name.
//
// A net's loader reads like this:
//   NetTensors net = take_net(read_weights(path), NetKind::kT5);  // prefix off, other nets' left out
//   TensorMap canonical = ...;                 // its own renaming of layouts, if it has several
//   canonical = expect_tensors(net.path, "T5 encoder", canonical, expected_shapes(config),
//                              {"lm_head.*"});
//   weights_sha256 = remembered_weights_sha256(net.stamps, "t5", canonical, rehash);
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/core/dtype.h"
#include "common/core/hash.h"
#include "common/tensor/fwd.h"
#include "common/tensor/weight_file.h"

namespace flux {

enum class NetKind { kFlux, kAutoEncoder, kT5, kClip };

/// "FLUX transformer", "autoencoder", "T5 encoder", "CLIP text encoder".
std::string_view net_title(NetKind kind);

/// The tensors of one net, by their names in the file without `prefix`.
struct NetTensors {
  std::filesystem::path path;
  std::vector<FileStamp> stamps;
  std::string prefix;  // what was taken off each name: "" or, of an all-in-one file,
                       // "model.diffusion_model." for one
  TensorMap tensors;
  std::map<std::string, std::string> metadata;
};

/// Finds the net in a file: by its known names (BFL, HF and diffusers layouts), under no prefix or
/// one of the net's known ones (FLUX: model.diffusion_model. diffusion_model. transformer.;
/// autoencoder: vae. first_stage_model.; T5: text_encoders.t5xxl.transformer. transformer.; CLIP:
/// text_encoders.clip_l.transformer. cond_stage_model.transformer.
/// conditioner.embedders.0.transformer. transformer.). Tensors under the prefixes of other nets are
/// left out; a tensor that belongs to no known net stays under its full name, for expect_tensors to
/// list.
///
/// Throws InputError: the net is not in the file (naming what is, if it is known), or the file is
/// of a kind that is not supported: scaled fp8, bitsandbytes, GPTQ-like packed weights; for kFlux
/// Chroma, FLUX.2, Kontext, Fill, Control and LoRA files; for kAutoEncoder Stable Diffusion's; for
/// kT5 umT5 and T5 v1.0; for kClip CLIP-G. Source: the published files of the nets.
NetTensors take_net(const WeightFile& file, NetKind kind);
/// The nets found in a file, in the order of NetKind. Throws nothing.
std::vector<NetKind> nets_in(const WeightFile& file);

using ShapeMap = std::map<std::string, std::vector<int64_t>>;

/// Size `dim` of a tensor that a net's configuration is read off; matrices and convolutions, or
/// dimension 0 of anything. Throws InputError "PATH: not TITLE: no tensor NAME", with the hint, if
/// it is not there or has no such dimension.
///   title  "a T5 v1.1 encoder"
int64_t size_for_config(const std::filesystem::path& path,
                        std::string_view title,
                        const TensorMap& tensors,
                        const std::string& name,
                        int64_t dim,
                        const std::string& hint);

/// `tensors` without the ignorable ones, once names and shapes are exactly those expected.
/// `ignorable` holds names, or beginnings with a '*' at the end. Otherwise throws ONE InputError
/// that lists missing, surplus, misshapen and mistyped tensors with their counts and first names.
///   title  "T5 encoder"; for the message
TensorMap expect_tensors(const std::filesystem::path& path,
                         std::string_view title,
                         const TensorMap& tensors,
                         const ShapeMap& expected,
                         std::span<const std::string_view> ignorable = {});
TensorMap expect_tensors(const std::filesystem::path& path,
                         std::string_view title,
                         const TensorMap& tensors,
                         const ShapeMap& expected,
                         std::initializer_list<std::string_view> ignorable);

/// The identity of a net's weights: independent of file layout, sharding, prefixes, order,
/// metadata. It is the SHA-256 of
///
///   the 28 bytes "flux-stages weights_sha256 1" and a zero byte,
///   the number of tensors as 8 bytes, little-endian,
///   then for each tensor, sorted by the bytes of its canonical name:
///     length of the name in bytes (8 bytes, little-endian), the name in UTF-8
///     length of the dtype (8 bytes), the dtype as safetensors writes it, "BF16" for one
///     rank (8 bytes), each dimension (8 bytes)
///     length of the data in bytes (8 bytes), the data: row-major, little-endian, as stored in the
///     file
///
/// Canonical names are those of the BFL layout (FLUX, autoencoder) and of Hugging Face with
/// `text_model.` (CLIP) and `shared.weight` (T5); ignorable tensors are left out, and dtypes are
/// those of the file.
Sha256Digest weights_sha256(const TensorMap& canonical);

/// A tensor that need not be in memory.
struct TensorStream {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::function<void(Sha256& hash)> add_data;  // adds the data, as stored in the file
};
/// The same of tensors by canonical name.
Sha256Digest weights_sha256(const std::map<std::string, TensorStream>& canonical);

/// weights_sha256, remembered in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, then
/// flux-stages/hashes.json) under the stamps of all files and `net` ("flux", "vae", "t5", "clip"),
/// so that the next run of a tool need not read 24 GB for it. `rehash` ignores what is remembered.
/// Several processes may do this at once (atomic replacement: at worst one's entry is lost). A
/// cache folder that cannot be read or written is no error. Files changed within the last second
/// are hashed but not remembered, nor files that changed while they were hashed.
Sha256Digest remembered_weights_sha256(std::span<const FileStamp> stamps,
                                       std::string_view net,
                                       const TensorMap& canonical,
                                       bool rehash = false);
/// The same; `compute` makes the hash where it is not remembered.
Sha256Digest remembered_weights_sha256(std::span<const FileStamp> stamps,
                                       std::string_view net,
                                       const std::function<Sha256Digest()>& compute,
                                       bool rehash = false);

}  // namespace flux
