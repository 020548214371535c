#include "pipelines/model/tiny.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <string_view>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
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
#include "pipelines/model/random_scales.h"
#include "pipelines/model/random_streams.h"

namespace flux::model {
namespace fs = std::filesystem;
namespace {

using ScaleOf = std::function<Scale(std::string_view name, const std::vector<int64_t>& shape)>;

/// The log-variance half of the encoder's output: small and well below zero, as a trained
/// autoencoder has it.
void calm_logvar(std::string_view name, std::span<float> values) {
  if (name == "encoder.conv_out.weight") {
    for (float& value : values.subspan(values.size() / 2)) value *= 0.1f;
  } else if (name == "encoder.conv_out.bias") {
    for (float& value : values.subspan(values.size() / 2)) value -= 6.0f;
  }
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
  tool.group("Instead of small models");
  tool.flag("geometry",
            "dev|schnell|t5-xxl",
            "one file of random weights in the sizes of the published model, to measure with: "
            "flux.safetensors (24 GB) or t5.safetensors (9.5 GB)",
            "",
            [&options](const std::string& word) { options.geometry = parse_geometry(word); });
  tool.flag("depth",
            options.depth,
            "D,S",
            "numbers of double and single blocks with --geometry dev or schnell; of t5-xxl the "
            "number of layers");
}

void check(const TinyOptions& options) {
  if (options.out.empty()) throw UsageError("--out is missing", "say where to write: --out models");
  if (options.geometry) {
    if (!options.t5_tokenizer.empty() || !options.clip_tokenizer.empty())
      throw UsageError(
          "--geometry writes no tokenizers: --t5-tokenizer and --clip-tokenizer do not go with it");
    if (!options.depth.empty()) parse_depth(options.depth, *options.geometry);
  } else if (!options.depth.empty()) {
    throw UsageError("--depth goes with --geometry only", "add --geometry dev");
  }
}

GeometryOptions geometry_options(const TinyOptions& options) {
  GeometryOptions out{
      options.geometry.value(), {}, options.out, static_cast<uint64_t>(options.seed)};
  if (!options.depth.empty()) out.depth = parse_depth(options.depth, out.geometry);
  return out;
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
