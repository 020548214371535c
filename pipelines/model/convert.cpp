#include "pipelines/model/convert.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <vector>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/engine/model_file.h"
#include "common/models/flux/load.h"
#include "common/models/flux/names.h"
#include "common/models/weights/weights.h"
#include "common/quant/quant.h"
#include "common/tensor/tensor.h"
#include "formats/safetensors/set_writer.h"
#include "pipelines/model/convert_net.h"

namespace flux::model {
namespace fs = std::filesystem;
namespace {

const Choices<DType> kDtypes{
    {"bf16", DType::kBF16}, {"f16", DType::kF16}, {"f32", DType::kF32}, {"fp8", DType::kF8E4M3}};

/// What is written of one BFL tensor.
struct Item {
  std::string name;
  std::vector<int64_t> shape;
  at::ScalarType stored{};   // in the file, of what is not quantised there
  at::ScalarType written{};  // of what is not quantised
  /// Where its codes and scales are read; -1: it is read as a tensor.
  int64_t record = -1;
  engine::Slice codes{}, scales{};
  bool keeps_codes = false;
};

class Conversion {
 public:
  explicit Conversion(const ConvertOptions& options)
      : options_(options),
        model_(options.in, {.dtype = at::kBFloat16, .quant = options.quantize}),
        stored_quant_(stored_quant_format(model_.metadata(), options.in)) {
    if (stored_quant_ && options.quantize)
      throw InputError(show(options.in) + ": is quantised already",
                       "convert the file that it was made of");
    keeps_codes_ = options.quantize || (stored_quant_ && !options.dtype);
    find_stored();
    layout_ = options.layout.value_or(is_bfl_ || keeps_codes_ ? dit::ModelLayout::kBfl
                                                              : dit::ModelLayout::kDiffusers);
    if (keeps_codes_ && layout_ == dit::ModelLayout::kDiffusers)
      throw UsageError("--layout diffusers: a quantised model has BFL names only",
                       "leave it out, or give --dtype bf16 for a plain model");
    tensors_.emplace(model_.config(), layout_);
    make_items();
  }

  ConvertReport run() {
    ConvertReport report;
    std::vector<safetensors::TensorSpec> specs;
    for (const Item& item : items_) {
      if (item.keeps_codes) {
        specs.push_back({item.name, dtype_of(item.codes.dtype), item.codes.shape});
        specs.push_back({scale_name(item.name), DType::kF32, item.scales.shape});
      } else {
        for (const auto& piece : tensors_->pieces(item.name))
          specs.push_back({piece.name, dtype_of(item.written), piece.shape});
      }
    }
    auto metadata = model_.metadata();
    metadata.merge(safetensors::pt_metadata());
    metadata[kConvertedKey] = fmt::format("flux-model {}", tool_version());
    const std::string key(kQuantMetadataKey);
    metadata.erase(key);
    if (keeps_codes_) metadata[key] = report.format = stored_quant_name(*model_.quant());

    const bool diffusers = layout_ == dit::ModelLayout::kDiffusers;
    const safetensors::SetPlace place{options_.out,
                                      diffusers ? "diffusion_pytorch_model" : "model",
                                      static_cast<uint64_t>(options_.shard_bytes)};
    safetensors::SetWriter writer(place, specs, metadata, kConvertedKey, "flux-model convert");
    Progress progress("convert", "MB", static_cast<int64_t>(writer.total_bytes() / kProgressUnit));
    for (const Item& item : items_) {
      cancel::check();
      write(item, writer);
      ++(item.keeps_codes ? report.quantized : report.tensors);
      progress.update(static_cast<int64_t>(writer.written_bytes() / kProgressUnit));
    }
    if (diffusers && place.folder() == place.out)
      write_file_atomic(place.out / "config.json", dit::diffusers_config_json(model_.config()));
    writer.commit();
    report.file = writer.path();
    report.files = writer.num_files();
    report.layout = diffusers ? "diffusers" : "bfl";
    report.bytes = static_cast<int64_t>(writer.total_bytes());
    return report;
  }

 private:
  /// The dtypes of what is not quantised in the file, and its layout.
  void find_stored() {
    WeightFile file = read_weights(options_.in);
    if (stored_quant_) {
      for (const auto& [name, tensor] : file.tensors) stored_[name] = tensor.scalar_type();
      return;
    }
    const NetTensors net = take_net(file, NetKind::kFlux);
    is_bfl_ = net.tensors.contains("img_in.weight");
    for (const auto& [name, parts] : dit::canonical_parts(net, model_.config()))
      stored_[name] = parts.at(0).tensor.scalar_type();
  }

  void make_items() {
    std::map<std::string, Item> coded;
    if (model_.quant())
      for (int64_t i = 0; i < model_.num_records(); ++i) {
        const auto& slices = model_.layout(i).slices();
        for (size_t s = 0; s + 1 < slices.size(); ++s) {
          const std::string name = engine::block_prefix(model_.config(), i) + slices[s].name;
          if (!is_quantized_name(name)) continue;
          Item& item = coded[name];
          item.record = i;
          item.codes = slices[s];
          item.scales = slices[s + 1];
        }
      }
    for (const auto& [name, shape] : dit::tensor_shapes(model_.config())) {
      Item item;
      if (const auto found = coded.find(name); found != coded.end()) item = found->second;
      item.name = name;
      item.shape = shape;
      item.keeps_codes = item.record >= 0 && keeps_codes_;
      if (item.record < 0) item.stored = stored_.at(name);
      item.written = options_.dtype      ? *scalar_type(*options_.dtype)
                     : options_.quantize ? at::kBFloat16
                                         : item.stored;
      items_.push_back(std::move(item));
    }
  }

  void write(const Item& item, safetensors::SetWriter& writer) {
    if (item.record >= 0) {
      // codes, then their scales: in one piece, since they are made together
      memory_.resize(static_cast<size_t>(item.scales.end() - item.codes.offset));
      model_.read(item.record, item.codes.offset, memory_);
      const auto view = [&](const engine::Slice& slice) {
        return at::from_blob(memory_.data() + (slice.offset - item.codes.offset),
                             slice.shape,
                             at::TensorOptions(slice.dtype));
      };
      const at::Tensor codes = view(item.codes), scales = view(item.scales);
      require_finite(scales, item.name, options_.in);
      if (item.keeps_codes) {
        writer.write(item.name, host_bytes(codes));
        writer.write(scale_name(item.name), host_bytes(scales));
        return;
      }
      const at::Tensor plain = at::empty(item.shape, at::kFloat);
      dequantize_into({*model_.quant(), codes, scales}, plain);
      return write_plain(item, plain, writer);
    }
    const at::Tensor tensor = at::empty(item.shape, item.stored);
    model_.read_tensor(item.name, tensor);
    write_plain(item, tensor, writer);
  }

  void write_plain(const Item& item, const at::Tensor& tensor, safetensors::SetWriter& writer) {
    const at::Tensor written = narrowed(tensor, item.written, item.name, options_.in);
    tensors_->split(item.name, written, [&](const std::string& name, const at::Tensor& piece) {
      writer.write(name, host_bytes(piece));
    });
  }

  const ConvertOptions& options_;
  engine::ModelFile model_;
  std::optional<QuantFormat> stored_quant_;
  bool keeps_codes_ = false, is_bfl_ = true;
  dit::ModelLayout layout_ = dit::ModelLayout::kBfl;
  std::optional<dit::FileTensors> tensors_;
  std::map<std::string, at::ScalarType> stored_;
  std::vector<Item> items_;
  std::vector<std::byte> memory_;
};

}  // namespace

void add_flags(ConvertOptions& options, Tool& tool) {
  tool.about(
      "Writes a FLUX transformer, an autoencoder or a text encoder in another layout, dtype or "
      "number "
      "of files; a transformer also with the matrices of its blocks in 8 or 4 bits, so that "
      "training "
      "a LoRA reads half or a quarter of the bytes.",
      "flux-model convert --quantize fp8 --in flux1-dev.safetensors --out "
      "flux1-dev-fp8.safetensors");
  tool.flag("in", options.in, "FILE", "weights: a file, a sharded index, or a folder");
  tool.flag("out",
            options.out,
            "FILE",
            "what to write: NAME.safetensors, or a folder for model.safetensors or, in diffusers' "
            "layout, diffusion_pytorch_model.safetensors and config.json");
  tool.flag("layout",
            options.layout,
            dit::model_layouts(),
            "names of the tensors of a transformer or an autoencoder",
            "as in --in");
  tool.flag("dtype",
            options.dtype,
            kDtypes,
            "of all tensors; fp8: plain e4m3 without scales; what is quantised becomes plain",
            "as in --in");
  tool.flag("quantize",
            "fp8|nf4",
            "fp8: e4m3 with a scale for 64 weights; nf4: 4 bits as bitsandbytes has them",
            "",
            [&options](const std::string& word) { options.quantize = parse_quant_format(word); });
  tool.bytes_flag("shard-size",
                  options.shard_bytes,
                  "most bytes of a file: NAME-00001-of-0000N.safetensors and an index",
                  "one file");
}

void check(const ConvertOptions& options) {
  if (options.in.empty())
    throw UsageError("--in is missing", "name the transformer: --in flux1-dev.safetensors");
  if (options.out.empty())
    throw UsageError("--out is missing", "name the file to write: --out flux1-dev-fp8.safetensors");
  if (options.quantize && options.dtype)
    throw UsageError("--dtype has no effect with --quantize, which says what is stored",
                     "leave one of them out");
  if (options.quantize && options.layout == dit::ModelLayout::kDiffusers)
    throw UsageError("--layout diffusers: a quantised model has BFL names only", "leave it out");
}

ConvertReport convert(const ConvertOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  std::error_code error;
  if (fs::equivalent(options.in, options.out, error))
    throw UsageError(show(options.out) + ": --out is the file that --in reads",
                     "write to another file");
  const auto kinds = nets_in(read_weights(options.in));
  const bool other = kinds.size() == 1 && kinds[0] != NetKind::kFlux;
  ConvertReport report = other ? convert_net(options, kinds[0]) : Conversion(options).run();
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

std::string ConvertReport::line() const {
  return fmt::format(
      "wrote {} files={} layout={}{} quantized={} plain={} bytes={} seconds={:.1f} rate={}/s",
      show(file),
      files,
      layout,
      format.empty() ? "" : " format=" + format,
      quantized,
      tensors,
      bytes,
      seconds,
      show_bytes(static_cast<uint64_t>(static_cast<double>(bytes) / std::max(seconds, 1e-3))));
}

nlohmann::json ConvertReport::json() const {
  return {{"file", printable(file.native())},
          {"files", files},
          {"layout", layout},
          {"format", format.empty() ? nlohmann::json() : nlohmann::json(format)},
          {"quantized", quantized},
          {"plain", tensors},
          {"bytes", bytes},
          {"seconds", seconds}};
}

}  // namespace flux::model
