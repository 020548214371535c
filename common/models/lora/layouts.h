// common/models/lora/layouts.h - the layouts of adapter files: names, fused and split q, k, v, alpha; both ways.
//
// An AdapterFile gives what a file says under the names of the model (BFL), a layer at a time; a LayoutWriter turns
// that into the tensors of any layout. Nothing is computed before it is asked for.
// Sources: kohya-ss/sd-scripts, networks/lora_flux.py; huggingface/diffusers, loaders/lora_conversion_utils.py;
// comfyanonymous/ComfyUI, comfy/lora.py and lora_convert.py; XLabs-AI/x-flux; KohakuBlueleaf/LyCORIS.
#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/models/flux/config.h"
#include "common/models/lora/lora.h"
#include "common/tensor/fwd.h"

namespace flux::lora {

/// Names of files:
///   kSdScripts  lora_unet_ + BFL path with underscores, .lora_down.weight, .lora_up.weight, .alpha; lora_te1_ (CLIP),
///               lora_te3_ (T5); LyCORIS' LoKr and dora_scale; full differences .diff and .diff_b
///   kDiffusers  transformer. + diffusers path, .lora_A.weight, .lora_B.weight, .lora_B.bias, .lora_magnitude_vector;
///               q, k, v and the MLP half of linear1 apart; text_encoder. (CLIP), text_encoder_2. (T5). PEFT's own too
///   kMixture    lora_transformer_ + diffusers path with underscores, suffixes of kSdScripts
///   kOneTrainer the same with lora_te2_ for T5; may hold embeddings, bundle_emb.*
///   kComfyUi    diffusion_model. + BFL path, suffixes of kSdScripts; text_encoders.clip_l.transformer.,
///               text_encoders.t5xxl.transformer.; .set_weight replaces a tensor
///   kXlabs      double_blocks.N.processor.qkv_lora1 (2: text), .proj_lora1, single_blocks.N.processor.qkv_lora,
///               .proj_lora; .down.weight, .up.weight
///   kControl    BFL path, .lora_A.weight, .lora_B.weight, .lora_B.bias, and whole norms: BFL's control LoRA
///   kFal        base_model.model. + BFL path, .lora_A.weight, .lora_B.weight
/// The scale alpha / rank is 1 where a layout has no alpha.
enum class Layout {
  kSdScripts,
  kDiffusers,
  kMixture,
  kOneTrainer,
  kComfyUi,
  kXlabs,
  kControl,
  kFal
};
/// {"sd-scripts", kSdScripts}, ...; "peft" is diffusers' layout, "kohya" that of sd-scripts.
const std::vector<std::pair<std::string, Layout>>& layout_words();
std::string_view layout_name(Layout layout);

/// What a file says of one Linear of the transformer.
struct Entry {
  Module module;    // without `down`: no pair of matrices
  at::Tensor diff;  // [out, in] to be added to the weight, or undefined
  at::Tensor bias;  // [out] to be added to the bias, or undefined
};

/// An adapter of a text encoder: W + alpha / rank * up down.
struct TextModule {
  enum class Encoder { kClip, kT5 } encoder = Encoder::kClip;
  std::string path;  // of Hugging Face: "text_model.encoder.layers.0.mlp.fc1"
  at::Tensor down, up;
  double alpha = 1;
  double scale() const { return alpha / static_cast<double>(down.size(0)); }
};

/// An adapter file of any layout.
class AdapterFile {
 public:
  /// Reads names, shapes and metadata, no values but alphas. `config`: of the model; nothing: as far as the file tells
  /// (sizes from shapes, numbers of blocks from names; what it does not tell is that of FLUX.1-dev). Throws InputError,
  /// naming the tensor, for a module that the model lacks, a wrong shape, a half pair, or a kind that is not supported
  /// (other LyCORIS, DoRA of columns, adapters of convolutions).
  AdapterFile(const TensorMap& tensors,
              const Metadata& metadata,
              std::optional<dit::Config> config = std::nullopt);

  Layout layout() const;
  const dit::Config& config() const;
  /// The adapted Linears in the order of all_targets(). Rank and alpha are those of the fused module; 0 without one.
  const std::vector<Target>& targets() const;
  /// Fused: downs stacked, ups on the diagonal, alpha the rank of all times their scale, which is folded into the ups
  /// where it differs between parts. Throws InputError for parts that cannot be one module.
  Entry entry(const std::string& path) const;
  /// The tensors of the file that entry() reads, for a caller that counts or lets go of their memory.
  std::vector<at::Tensor> sources(const std::string& path) const;

  const std::vector<TextModule>& text_modules() const;
  /// By BFL name of a tensor: what it is replaced by.
  const TensorMap& replaced() const;
  /// bundle_emb.*, as in the file.
  const TensorMap& embeddings() const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

/// Adds PEFT's configuration to the metadata where it lies beside the file: adapter_config.json of a folder, or beside
/// adapter_model.safetensors. Its alpha would be lost otherwise. Throws InputError if it is no JSON object.
void add_peft_config(const std::filesystem::path& file, Metadata& metadata);

/// The tensors of one layout.
class LayoutWriter {
 public:
  using Emit = std::function<void(const std::string& name, const at::Tensor& tensor)>;

  ///   dtype  of matrices; nothing: each keeps its own, but for those into which a scale goes and does not fit: float32
  LayoutWriter(Layout layout,
               const dit::Config& config,
               std::optional<at::ScalarType> dtype = std::nullopt);

  /// Exact: fused modules fall apart by the diagonal blocks of their ups, or, where these are not all, with the down
  /// shared; LoKr becomes a pair of a larger rank where the layout has none. Throws InputError, naming the module,
  /// for what the layout cannot hold.
  void write(const Entry& entry, const Emit& emit) const;
  void write(const TextModule& module, const Emit& emit) const;
  void write_replaced(const std::string& name, const at::Tensor& tensor, const Emit& emit) const;
  /// Throws InputError if the layout has no embeddings.
  void write_embedding(const std::string& name, const at::Tensor& tensor, const Emit& emit) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

/// LoKr as a pair of matrices in float32: kron(mix, up down) of rank columns(mix) * rank or rows(mix) * rank, the
/// smaller. Others stay as they are.
Module without_lokr(const Module& module);

/// The tensors of `adapters` in any layout: write() of all.
TensorMap to_layout(const Adapters& adapters,
                    Layout layout,
                    const dit::Config& config,
                    std::optional<at::ScalarType> dtype);

}  // namespace flux::lora
