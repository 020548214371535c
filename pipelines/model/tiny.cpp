#include "pipelines/model/tiny.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <string_view>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/hash.h"
#include "common/core/rng.h"
#include "common/core/text.h"
#include "common/models/clip/clip.h"
#include "common/models/flux/names.h"
#include "common/models/t5/t5.h"
#include "common/models/vae/vae.h"
#include "common/tensor/tensor.h"
#include "common/tokenizers/clip_bpe.h"
#include "common/tokenizers/t5_unigram.h"
#include "common/tokenizers/tiny.h"
#include "formats/safetensors/writer.h"

namespace flux::model {
namespace fs = std::filesystem;
namespace {

/// Mean and standard deviation of a tensor's random values.
struct Scale {
  double mean = 0, deviation = 1;
};
using ScaleOf = std::function<Scale(std::string_view name, const std::vector<int64_t>& shape)>;

/// Keeps the variance of a signal through a linear layer or convolution, times gain^2.
Scale linear_scale(const std::vector<int64_t>& shape, double gain = 1) {
  int64_t fan_in = 1;
  for (size_t i = 1; i < shape.size(); ++i) fan_in *= shape[i];
  return {0, gain / std::sqrt(static_cast<double>(fan_in))};
}

bool contains(std::string_view name, std::string_view part) {
  return name.find(part) != std::string_view::npos;
}

Scale flux_scale(std::string_view name, const std::vector<int64_t>& shape) {
  if (name.ends_with("_norm.scale")) return {1, 0.1};
  if (name.ends_with(".bias")) return {0, 0.05};
  // LoRAs do not reach the last layer: it must be able to put out a velocity (deviation about 1.4)
  // by itself
  return linear_scale(shape, name == "final_layer.linear.weight" ? 1.5 : 1.0);
}

Scale ae_scale(std::string_view name, const std::vector<int64_t>& shape) {
  if (contains(name, "norm")) return name.ends_with(".weight") ? Scale{1, 0.1} : Scale{0, 0.05};
  if (name.ends_with(".bias")) return {0, 0.05};
  // the activation before it has a root mean square of 0.6, raw latents about 2.8
  if (name == "encoder.conv_out.weight") return linear_scale(shape, 4.5);
  return linear_scale(shape);
}

Scale t5_scale(std::string_view name, const std::vector<int64_t>& shape) {
  if (contains(name, "layer_norm")) return {1, 0.1};
  if (name == "shared.weight" || contains(name, "relative_attention_bias")) return {0, 1};
  // scores are not divided by sqrt(head size)
  if (contains(name, "SelfAttention.q.") || contains(name, "SelfAttention.k."))
    return linear_scale(shape, 0.5);
  return linear_scale(shape);
}

Scale clip_scale(std::string_view name, const std::vector<int64_t>& shape) {
  if (contains(name, "norm")) return name.ends_with(".weight") ? Scale{1, 0.1} : Scale{0, 0.05};
  if (contains(name, "position_embedding")) return {0, 0.3};
  if (contains(name, "token_embedding")) return {0, 1};
  if (name.ends_with(".bias")) return {0, 0.05};
  return linear_scale(shape, 1.5);
}

/// The log-variance half of the encoder's output: small and well below zero, as a trained
/// autoencoder has it.
void calm_logvar(std::string_view name, std::span<float> values) {
  if (name == "encoder.conv_out.weight") {
    for (float& value : values.subspan(values.size() / 2)) value *= 0.1f;
  } else if (name == "encoder.conv_out.bias") {
    for (float& value : values.subspan(values.size() / 2)) value -= 6.0f;
  }
}

/// Each tensor has a stream of its own, keyed by its name, so that it does not depend on what else
/// is in the file.
RandomStream stream_of(uint64_t seed, std::string_view net, std::string_view name) {
  const Sha256Digest digest = Sha256().add_field(net).add_field(name).digest();
  uint64_t words[2];
  std::memcpy(words, digest.data(), sizeof words);
  return RandomStream(seed, Purpose::kTinyModel, words[0], words[1]);
}

/// Writes a net of random values; returns its number of parameters.
int64_t write_net(const fs::path& path,
                  std::string_view net,
                  uint64_t seed,
                  const ShapeMap& shapes,
                  DType dtype,
                  const ScaleOf& scale_of) {
  std::vector<safetensors::TensorSpec> specs;
  for (const auto& [name, shape] : shapes) specs.push_back({name, dtype, shape});
  safetensors::Writer writer(path, std::move(specs), safetensors::pt_metadata());
  int64_t num_parameters = 0;
  for (const safetensors::TensorSpec& spec : writer.order()) {
    at::Tensor tensor = at::empty(spec.shape, at::kFloat);
    const std::span<float> values(tensor.mutable_data_ptr<float>(),
                                  static_cast<size_t>(tensor.numel()));
    stream_of(seed, net, spec.name).fill_normal(values);
    const Scale scale = scale_of(spec.name, spec.shape);
    for (float& value : values)
      value = static_cast<float>(scale.mean + scale.deviation * static_cast<double>(value));
    calm_logvar(spec.name, values);
    writer.write(spec.name, host_bytes(to_dtype(tensor, *scalar_type(dtype))));
    num_parameters += tensor.numel();
  }
  writer.commit();
  return num_parameters;
}

/// Copies the first complete set of `choices` that `given` (a folder, or a file of a set) holds
/// into `folder`, and takes away what an earlier run left there under the names of the other sets.
void copy_vocabulary(const fs::path& given,
                     const fs::path& folder,
                     const std::vector<std::vector<std::string>>& choices) {
  const fs::path source = fs::is_directory(given) ? given : given.parent_path();
  const auto complete = [&](const std::vector<std::string>& names) {
    return std::all_of(names.begin(), names.end(), [&](const std::string& name) {
      return fs::is_regular_file(source / name);
    });
  };
  const auto chosen = std::find_if(choices.begin(), choices.end(), [&](const auto& names) {
    return complete(names) && (fs::is_directory(given) ||
                               std::count(names.begin(), names.end(), given.filename().native()));
  });
  make_folder(folder);
  std::vector<std::pair<std::string, std::string>> files;  // all read before anything is taken away
  if (chosen != choices.end()) {
    for (const std::string& name : *chosen) files.emplace_back(name, read_file(source / name));
  } else {  // a vocabulary under a name of the user's own: what kind it is, its bytes say
    const std::string bytes = read_file(given);
    files.emplace_back(trim(std::string_view(bytes).substr(0, 64)).starts_with('{')
                           ? "tokenizer.json"
                           : choices[0][0],
                       bytes);
  }
  for (const auto& names : choices) {
    for (const std::string& name : names) fs::remove(folder / name);
  }
  for (const auto& [name, bytes] : files) write_file_atomic(folder / name, bytes);
}

// A real model under one of the names is far larger than anything written here.
void refuse_to_replace(const fs::path& folder) {
  constexpr uintmax_t kLargestTiny = uintmax_t{64} << 20;
  for (const char* name :
       {"flux.safetensors", "ae.safetensors", "t5.safetensors", "clip.safetensors"}) {
    std::error_code error;
    const auto size = fs::file_size(folder / name, error);
    if (!error && size > kLargestTiny) {
      throw UsageError(fmt::format("{}: {} of weights would be replaced by a small random model",
                                   show(folder / name),
                                   show_bytes(size)),
                       "write into another folder, or move the file away");
    }
    if (!error) log::warn("{}: is replaced", show(folder / name));
  }
}

}  // namespace

void add_flags(TinyOptions& options, Tool& tool) {
  tool.about(
      "Writes small random models that the whole chain accepts: FLUX transformer, autoencoder, T5, "
      "CLIP, tokenizers.",
      "flux-model tiny --out models --seed 1");
  tool.flag("out", options.out, "DIR", "folder to write into");
  tool.flag(
      "seed", options.seed, "N", "of the weight values; shapes and tokenizers do not depend on it");
  tool.flag("t5-tokenizer",
            options.t5_tokenizer,
            "FILE",
            "size T5 to this vocabulary (spiece.model or tokenizer.json) and copy it");
  tool.flag("clip-tokenizer",
            options.clip_tokenizer,
            "DIR",
            "size CLIP to this vocabulary (folder with vocab.json and merges.txt, or "
            "tokenizer.json) and copy it");
}

void check(const TinyOptions& options) {
  if (options.out.empty()) throw UsageError("--out is missing", "say where to write: --out models");
}

TinyReport tiny(const TinyOptions& options) {
  const fs::path t5_folder = options.out / "tokenizers" / "t5",
                 clip_folder = options.out / "tokenizers" / "clip";
  // tokenizers first: what is wrong with a given one is found before anything is written
  if (!options.t5_tokenizer.empty()) tokenizers::T5Tokenizer::load(options.t5_tokenizer);
  if (!options.clip_tokenizer.empty()) tokenizers::ClipTokenizer::load(options.clip_tokenizer);
  refuse_to_replace(options.out);
  make_folder(options.out);
  // what is given is read, never overwritten: it may lie in the very folder
  if (options.t5_tokenizer.empty()) {
    make_folder(t5_folder);
    write_file_atomic(t5_folder / "spiece.model", tokenizers::tiny_t5_model());
  } else {
    copy_vocabulary(options.t5_tokenizer, t5_folder, {{"spiece.model"}, {"tokenizer.json"}});
  }
  if (options.clip_tokenizer.empty()) {
    make_folder(clip_folder);
    write_file_atomic(clip_folder / "vocab.json", tokenizers::tiny_clip_vocab());
    write_file_atomic(clip_folder / "merges.txt", tokenizers::tiny_clip_merges());
  } else {
    copy_vocabulary(
        options.clip_tokenizer, clip_folder, {{"vocab.json", "merges.txt"}, {"tokenizer.json"}});
  }

  // T5's table is longer than its vocabulary (32100 ids, 32128 rows), CLIP's is exactly as long:
  // the end token is its last row
  constexpr int64_t kRowMultiple = 128;
  t5::Config t5{.width = 64, .num_layers = 2, .num_heads = 4, .head_size = 16, .mlp = 160};
  t5.vocabulary = (tokenizers::T5Tokenizer::load(t5_folder).vocab_size() + kRowMultiple - 1) /
                  kRowMultiple * kRowMultiple;
  clip::Config clip{.hidden = 128, .num_layers = 2, .num_heads = 2, .mlp = 512};
  clip.vocabulary = tokenizers::ClipTokenizer::load(clip_folder).vocab_size();
  vae::Config ae{.channels = 32};
  dit::Config flux{.pooled_dim = clip.hidden,
                   .prompt_dim = t5.width,
                   .hidden = 256,
                   .mlp = 1024,
                   .num_heads = 2,
                   .num_double_blocks = 2,
                   .num_single_blocks = 2};
  ShapeMap flux_shapes;
  for (const auto& [name, shape] : dit::tensor_shapes(flux)) flux_shapes.emplace(name, shape);

  const auto seed = static_cast<uint64_t>(options.seed);
  TinyReport report;
  report.out = options.out;
  report.flux_parameters = write_net(
      options.out / "flux.safetensors", "flux", seed, flux_shapes, DType::kBF16, flux_scale);
  report.ae_parameters = write_net(
      options.out / "ae.safetensors", "vae", seed, vae::tensor_shapes(ae), DType::kF32, ae_scale);
  report.t5_parameters = write_net(
      options.out / "t5.safetensors", "t5", seed, t5::tensor_shapes(t5), DType::kBF16, t5_scale);
  report.clip_parameters = write_net(options.out / "clip.safetensors",
                                     "clip",
                                     seed,
                                     clip::tensor_shapes(clip),
                                     DType::kBF16,
                                     clip_scale);
  return report;
}

std::string TinyReport::line() const {
  return fmt::format(
      "wrote {} flux_parameters={} ae_parameters={} t5_parameters={} clip_parameters={}",
      show(out),
      flux_parameters,
      ae_parameters,
      t5_parameters,
      clip_parameters);
}

nlohmann::json TinyReport::json() const {
  return {{"out", printable(out.native())},
          {"flux_parameters", flux_parameters},
          {"ae_parameters", ae_parameters},
          {"t5_parameters", t5_parameters},
          {"clip_parameters", clip_parameters}};
}

}  // namespace flux::model
