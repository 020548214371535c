#include "pipelines/model/convert.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <stdexcept>
#include <vector>

#include "common/core/cancel.h"
#include "common/core/disk.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/engine/model_file.h"
#include "common/models/flux/names.h"
#include "common/quant/quant.h"
#include "common/tensor/tensor.h"
#include "formats/safetensors/writer.h"
#include "pipelines/model/output_file.h"

namespace flux::model {
namespace fs = std::filesystem;
namespace {

constexpr uint64_t kProgressUnit = 1000000;

/// A safetensors file whose tensors are written in any order: codes and scales of a matrix are made
/// together and lie far apart.
class AnyOrderWriter {
 public:
  AnyOrderWriter(const fs::path& path,
                 std::vector<safetensors::TensorSpec> specs,
                 const safetensors::Metadata& metadata)
      : header_(safetensors::header_bytes(specs, metadata)) {
    total_ = header_.size();
    for (auto& spec : safetensors::in_file_order(std::move(specs))) {
      const uint64_t bytes = safetensors::tensor_bytes(spec.dtype, spec.shape);
      offsets_[spec.name] = {total_, bytes};
      total_ += bytes;
    }
    require_free_space(path.parent_path(), total_);
    if (path.has_parent_path()) make_folder(path.parent_path());
    file_.emplace(path);
    file_->write(header_);
    written_ = header_.size();
  }

  uint64_t total_bytes() const { return total_; }
  uint64_t written_bytes() const { return written_; }

  void write(const std::string& name, std::span<const std::byte> bytes) {
    const auto [offset, size] = offsets_.at(name);
    if (bytes.size() != size) throw std::invalid_argument("bytes of " + name);
    file_->write_at(offset, bytes);
    written_ += size;
  }
  void commit() {
    if (written_ != total_) throw std::logic_error("a tensor was not written");
    file_->commit();
  }

 private:
  std::string header_;
  std::map<std::string, std::pair<uint64_t, uint64_t>> offsets_;
  uint64_t total_ = 0, written_ = 0;
  std::optional<AtomicFile> file_;
};

bool in_a_block(std::string_view name) {
  return name.starts_with("double_blocks.") || name.starts_with("single_blocks.");
}

void require_finite(std::span<const std::byte> scales,
                    const std::string& name,
                    const fs::path& path) {
  const auto* data = reinterpret_cast<const float*>(scales.data());
  if (std::all_of(data, data + scales.size() / sizeof(float), [](float scale) {
        return std::isfinite(scale);
      }))
    return;
  throw InputError(fmt::format("{}: tensor {} holds infinite values or NaN", show(path), name),
                   "the file is damaged: download it again");
}

}  // namespace

void add_flags(ConvertOptions& options, Tool& tool) {
  tool.about(
      "Writes a FLUX transformer with the matrices of its blocks in 8 or 4 bits, so that training "
      "a LoRA reads half or a quarter of the bytes.",
      "flux-model convert --quantize fp8 --in flux1-dev.safetensors --out "
      "flux1-dev-fp8.safetensors");
  tool.flag("quantize",
            "fp8|nf4",
            "fp8: e4m3 with a scale for 64 weights; nf4: 4 bits as bitsandbytes has them",
            "",
            [&options](const std::string& word) { options.quantize = parse_quant_format(word); });
  tool.flag("in", options.in, "FILE", "transformer: a file, a sharded index, or a folder");
  tool.flag("out", options.out, "FILE", "safetensors file to write");
}

void check(const ConvertOptions& options) {
  if (!options.quantize)
    throw UsageError("--quantize is missing", "say what to convert to: --quantize fp8");
  if (options.in.empty())
    throw UsageError("--in is missing", "name the transformer: --in flux1-dev.safetensors");
  if (options.out.empty())
    throw UsageError("--out is missing", "name the file to write: --out flux1-dev-fp8.safetensors");
}

ConvertReport convert(const ConvertOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  const QuantFormat format = options.quantize.value();
  std::error_code error;
  if (fs::equivalent(options.in, options.out, error))
    throw UsageError(show(options.out) + ": --out is the file that --in reads",
                     "write to another file");
  const engine::ModelFile model(options.in, {.dtype = at::kBFloat16, .quant = format});
  if (stored_quant_format(model.metadata(), options.in))
    throw InputError(show(options.in) + ": is quantised already",
                     "convert the file that it was made of");
  const std::string key(kQuantMetadataKey);
  require_replaceable(options.out, key, "flux-model convert");

  std::vector<safetensors::TensorSpec> specs;
  ConvertReport report{.file = options.out, .format = std::string(stored_quant_name(format))};
  std::vector<dit::NamedShape> outside = dit::tensor_shapes(model.config());
  std::erase_if(outside, [](const auto& tensor) { return in_a_block(tensor.name); });
  for (const auto& [name, shape] : outside) specs.push_back({name, DType::kBF16, shape});
  std::vector<std::string> prefixes;
  for (int64_t i = 0; i < model.num_records(); ++i) {
    prefixes.push_back(engine::block_prefix(model.config(), i));
    for (const auto& slice : model.layout(i).slices())
      specs.push_back({prefixes.back() + slice.name, dtype_of(slice.dtype), slice.shape});
  }
  auto metadata = model.metadata();
  metadata.merge(safetensors::pt_metadata());
  metadata[key] = report.format;

  AnyOrderWriter writer(options.out, std::move(specs), metadata);
  Progress progress("convert", "MB", static_cast<int64_t>(writer.total_bytes() / kProgressUnit));
  for (const auto& [name, shape] : outside) {
    const at::Tensor tensor = at::empty(shape, at::kBFloat16);
    model.read_tensor(name, tensor);
    writer.write(name, host_bytes(tensor));
    ++report.tensors;
  }
  size_t most = 0;
  for (int64_t i = 0; i < model.num_records(); ++i)
    for (const auto& slice : model.layout(i).slices())
      most = std::max(most, static_cast<size_t>(slice.bytes + slice.bytes / 8 + 4096));
  std::vector<std::byte> memory;
  memory.reserve(most);  // codes and scales: at once, so that it does not move when it grows
  for (int64_t i = 0; i < model.num_records(); ++i) {
    const std::string& prefix = prefixes[static_cast<size_t>(i)];
    const auto& slices = model.layout(i).slices();
    for (size_t s = 0; s < slices.size(); ++s) {
      cancel::check();
      const auto& first = slices[s];
      const bool quantized = is_quantized_name(prefix + first.name);
      const auto& last = slices[quantized ? s + 1 : s];  // codes, then their scales
      memory.resize(static_cast<size_t>(last.end() - first.offset));
      model.read(i, first.offset, memory);
      const std::span<const std::byte> bytes(memory);
      writer.write(prefix + first.name, bytes.first(static_cast<size_t>(first.bytes)));
      if (quantized) {
        const auto scales = bytes.last(static_cast<size_t>(last.bytes));
        require_finite(scales, prefix + first.name, options.in);
        writer.write(prefix + last.name, scales);
        ++s;
      }
      ++(quantized ? report.quantized : report.tensors);
      progress.update(static_cast<int64_t>(writer.written_bytes() / kProgressUnit));
    }
  }
  writer.commit();
  report.bytes = static_cast<int64_t>(writer.total_bytes());
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

std::string ConvertReport::line() const {
  return fmt::format("wrote {} format={} quantized={} bfloat16={} bytes={} seconds={:.1f}",
                     show(file),
                     format,
                     quantized,
                     tensors,
                     bytes,
                     seconds);
}

nlohmann::json ConvertReport::json() const {
  return {{"file", printable(file.native())},
          {"format", format},
          {"quantized", quantized},
          {"bfloat16", tensors},
          {"bytes", bytes},
          {"seconds", seconds}};
}

}  // namespace flux::model
