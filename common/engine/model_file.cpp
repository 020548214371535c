#include "common/engine/model_file.h"

#include <ATen/ops/from_blob.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/engine/tensor_file.h"
#include "common/models/flux/load.h"
#include "common/models/flux/names.h"
#include "common/models/weights/weights.h"
#include "common/tensor/tensor.h"
#include "common/tensor/weight_file.h"

namespace flux::engine {
namespace {

namespace fs = std::filesystem;

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

/// A slice of a record, or codes and scales that are made together.
struct Source {
  const StoredTensor* stored = nullptr;
  Slice slice;
  std::optional<Slice> scales;  // quantised while it is read: `slice` holds the codes
  const StoredTensor* stored_scales = nullptr;

  int64_t end() const { return scales ? scales->end() : slice.end(); }
};

struct Range {
  int64_t begin = 0, end = 0;
  bool empty() const { return begin >= end; }
};
Range overlap(const RecordPart& part, const Slice& slice) {
  const auto [begin, end] = part.overlap(slice.offset, slice.end());
  return {begin, end};
}

}  // namespace

struct ModelFile::Impl {
  ModelFileOptions options;
  fs::path path;
  std::vector<FileStamp> stamps;
  std::map<std::string, std::string> metadata;
  std::optional<QuantFormat> quant, stored_quant;
  dit::Config config;
  TensorFile files;
  std::map<std::string, StoredTensor> tensors;  // by canonical name; stored scales by scale_name()
  std::vector<RecordLayout> layouts;
  std::vector<std::vector<Source>> sources;  // by record, in the order of their slices

  Impl(const fs::path& where, const ModelFileOptions& how)
      : options(how), path(where), files(where, how.access) {
    WeightFile file = files.contents();
    stamps = file.stamps;
    metadata = file.metadata;
    find_stored_quant(file);
    const NetTensors net = take_net(file, NetKind::kFlux);
    config = dit::read_config(net);
    for (const auto& [name, parts] : dit::canonical_parts(net, config)) {
      if (tensors.contains(name)) continue;  // quantised
      add_stored(name, parts);
    }
    for (int64_t i = 0; i < config.num_double_blocks + config.num_single_blocks; ++i) add_record(i);
  }

  /// Takes quantised weights out of the file: in their place are matrices of the logical shape, for
  /// the checks that follow.
  void find_stored_quant(WeightFile& file) {
    stored_quant = stored_quant_format(metadata, path);
    if (options.quant && stored_quant && *options.quant != *stored_quant)
      throw InputError(fmt::format("{}: is quantised to {}, asked for is {}",
                                   show(path),
                                   quant_format_name(*stored_quant),
                                   quant_format_name(*options.quant)),
                       "give the file that it was made of, or ask for what it is");
    quant = stored_quant ? stored_quant : options.quant;
    if (!stored_quant) return;
    std::vector<std::string> names;
    for (const auto& [name, tensor] : file.tensors)
      if (is_quantized_name(name)) names.push_back(name);
    for (const std::string& name : names) {
      const QuantizedWeight weight = stored_weight(file.tensors, name, *stored_quant, path);
      for (const auto& [key, tensor] :
           {std::pair(name, weight.codes), std::pair(scale_name(name), weight.scales)})
        tensors[key] = files.stored(tensor);
      file.tensors.erase(scale_name(name));
      const std::array shape{weight.out(), weight.in()};
      file.tensors[name] = at::from_blob(nullptr, shape, at::TensorOptions(at::kBFloat16));
    }
  }

  void add_stored(const std::string& name, const std::vector<dit::CanonicalPart>& parts) {
    StoredTensor stored{parts[0].tensor.scalar_type(), parts[0].tensor.sizes().vec(), {}};
    stored.shape[0] = 0;
    for (const auto& [tensor, swap] : parts) {
      stored.shape[0] += tensor.size(0);
      if (tensor.numel() == 0) continue;
      const Piece whole = files.place(tensor);
      if (swap) {
        // chunk(2) gives the first the larger half
        const int64_t row_bytes = whole.bytes / tensor.size(0);
        const int64_t first = (tensor.size(0) + 1) / 2 * row_bytes;
        stored.pieces.push_back({whole.file, whole.offset + first, whole.bytes - first});
        stored.pieces.push_back({whole.file, whole.offset, first});
      } else {
        stored.pieces.push_back(whole);
      }
    }
    tensors[name] = std::move(stored);
  }

  void add_record(int64_t index) {
    const std::string prefix = block_prefix(config, index);
    const RecordLayout layout = block_layout(config, index, options.dtype, quant);
    std::vector<Source> list;
    for (size_t i = 0; i < layout.slices().size(); ++i) {
      const Slice& slice = layout.slices()[i];
      Source source{&tensors.at(prefix + slice.name), slice, std::nullopt, nullptr};
      if (quant && is_quantized_name(prefix + slice.name)) {
        source.scales = layout.slices().at(++i);
        if (stored_quant) source.stored_scales = &tensors.at(prefix + source.scales->name);
      }
      list.push_back(std::move(source));
    }
    layouts.push_back(layout);
    sources.push_back(std::move(list));
  }

  // --- reading

  /// Quantises what the target wants of codes and scales. Units are blocks, or whole rows where
  /// blocks end with a row that is no multiple of them.
  void read_quantised(const Source& source, const RecordPart& target) const {
    const Slice &codes = source.slice, &scales = *source.scales;
    const int64_t out = source.stored->shape[0], in = source.stored->shape[1];
    const bool by_row = *quant == QuantFormat::kFp8 && in % kQuantBlock != 0;
    const int64_t unit = by_row ? in : kQuantBlock, units = round_up(out * in, unit) / unit;
    const auto layout = quantized_layout(*quant, 1, unit);  // of one unit
    const auto units_of = [&](const Slice& slice, int64_t unit_bytes) -> Range {
      const Range part = overlap(target, slice);
      if (part.empty()) return {};
      return {(part.begin - slice.offset) / unit_bytes,
              std::min(units, round_up(part.end - slice.offset, unit_bytes) / unit_bytes)};
    };
    const Range of_codes = units_of(codes, layout.codes_bytes),
                of_scales = units_of(scales, layout.scales_bytes);
    // one pass over both if they touch
    std::vector<Range> passes;
    if (!of_codes.empty() && !of_scales.empty() &&
        std::max(of_codes.begin, of_scales.begin) <= std::min(of_codes.end, of_scales.end)) {
      passes = {{std::min(of_codes.begin, of_scales.begin), std::max(of_codes.end, of_scales.end)}};
    } else {
      passes = {of_codes, of_scales};
    }
    const int64_t step = std::max<int64_t>(1, kChunkValues / unit);
    for (const Range& pass : passes) {
      if (pass.empty()) continue;
      const int64_t most = std::min(step, pass.end - pass.begin) * unit;
      const HostMemory values(2 * most, MemoryCause::kRing);
      const HostMemory results(round_up(most, 64) + most / kQuantBlock * 4 + step * 4 + 64,
                               MemoryCause::kRing);
      for (int64_t first = pass.begin; first < pass.end; first += step) {
        const int64_t begin = first * unit,
                      count = std::min({step * unit, pass.end * unit - begin, out * in - begin});
        files.read_values(*source.stored, begin, count, at::kBFloat16, values.data());
        const int64_t rows = by_row ? count / in : 1;
        const auto part = quantized_layout(*quant, rows, count / rows);
        const auto view = [](std::byte* data, const auto& shape, c10::ScalarType dtype) {
          return at::from_blob(data, shape, at::TensorOptions(dtype));
        };
        std::byte* scale_data = results.data() + round_up(part.codes_bytes, 64);
        quantize_into(view(values.data(), std::array{rows, count / rows}, at::kBFloat16),
                      {*quant,
                       view(results.data(), part.codes_shape, part.codes_type),
                       view(scale_data, part.scales_shape, at::kFloat)});
        target.put(codes.offset + first * layout.codes_bytes,
                   {results.data(), static_cast<size_t>(part.codes_bytes)});
        target.put(scales.offset + first * layout.scales_bytes,
                   {scale_data, static_cast<size_t>(part.scales_bytes)});
      }
    }
  }

  void read(int64_t index, const RecordPart& target) const {
    int64_t end = 0;  // of what came before
    for (const Source& source : sources[static_cast<size_t>(index)]) {
      target.clear(end, source.slice.offset);
      if (source.scales) target.clear(source.slice.end(), source.scales->offset);
      end = source.end();
      if (!source.scales) {
        files.read_slice(*source.stored, source.slice, target);
      } else if (source.stored_scales) {
        files.read_slice(*source.stored, source.slice, target);
        files.read_slice(*source.stored_scales, *source.scales, target);
      } else {
        read_quantised(source, target);
      }
    }
    target.clear(end, layouts[static_cast<size_t>(index)].bytes());
  }
};

std::string block_prefix(const dit::Config& config, int64_t block) {
  const int64_t num_blocks = config.num_double_blocks + config.num_single_blocks;
  if (block < 0 || block >= num_blocks)
    throw std::invalid_argument(fmt::format("block {} of {}", block, num_blocks));
  return block < config.num_double_blocks
             ? fmt::format("double_blocks.{}.", block)
             : fmt::format("single_blocks.{}.", block - config.num_double_blocks);
}

RecordLayout block_layout(const dit::Config& config,
                          int64_t block,
                          c10::ScalarType dtype,
                          std::optional<QuantFormat> quant) {
  const std::string prefix = block_prefix(config, block);
  RecordLayout layout;
  for (const auto& [name, shape] : dit::tensor_shapes(config)) {
    if (!name.starts_with(prefix)) continue;
    const std::string rest = name.substr(prefix.size());
    if (quant && is_quantized_name(name)) {
      const auto quantized = quantized_layout(*quant, shape[0], shape[1]);
      layout.add(rest, quantized.codes_shape, quantized.codes_type);
      layout.add(scale_name(rest), quantized.scales_shape, c10::ScalarType::Float);
    } else {
      layout.add(rest, shape, dtype);
    }
  }
  return layout;
}

ModelFile::ModelFile(const fs::path& path, const ModelFileOptions& options)
    : impl_(std::make_unique<const Impl>(path, options)) {}
ModelFile::~ModelFile() = default;

const dit::Config& ModelFile::config() const { return impl_->config; }
const fs::path& ModelFile::path() const { return impl_->path; }
const std::vector<FileStamp>& ModelFile::stamps() const { return impl_->stamps; }
const std::map<std::string, std::string>& ModelFile::metadata() const { return impl_->metadata; }
std::optional<QuantFormat> ModelFile::quant() const { return impl_->quant; }
const RecordLayout& ModelFile::layout(int64_t index) const {
  return impl_->layouts.at(static_cast<size_t>(index));
}

int64_t ModelFile::num_records() const { return std::ssize(impl_->layouts); }
int64_t ModelFile::record_bytes(int64_t index) const { return layout(index).bytes(); }

void ModelFile::read(int64_t index, int64_t offset, std::span<std::byte> to) const {
  check_range(index, offset, to.size());
  impl_->read(index, {offset, offset + static_cast<int64_t>(to.size()), to.data()});
}

void ModelFile::prefetch(int64_t index) const {
  for (const Source& source : impl_->sources.at(static_cast<size_t>(index)))
    for (const StoredTensor* stored : {source.stored, source.stored_scales})
      if (stored) impl_->files.prefetch(*stored);
}

std::vector<std::pair<int64_t, int64_t>> ModelFile::parts(int64_t index, int64_t max_bytes) const {
  if (!impl_->quant || impl_->stored_quant) return RecordStore::parts(index, max_bytes);
  // codes and scales that are made together stay together
  std::vector<std::pair<int64_t, int64_t>> parts;
  int64_t begin = 0, end = 0;
  const auto& sources = impl_->sources.at(static_cast<size_t>(index));
  for (size_t i = 0; i < sources.size(); ++i) {
    const int64_t next = i + 1 < sources.size() ? sources[i + 1].slice.offset : record_bytes(index);
    if (end > begin && next - begin > max_bytes) {
      parts.emplace_back(begin, end - begin);
      begin = end;
    }
    end = next;
  }
  parts.emplace_back(begin, end - begin);
  return parts;
}

int64_t ModelFile::staging_bytes() const {
  int64_t most = 0;
  for (const auto& record : impl_->sources)
    for (const Source& source : record) {
      const bool quantises = source.scales && !source.stored_scales;
      const auto wanted = quantises ? at::kBFloat16 : source.slice.dtype;
      int64_t bytes =
          source.stored_scales ? 0 : TensorFile::conversion_bytes(*source.stored, wanted);
      if (quantises) {  // bfloat16, codes, scales
        int64_t values = 1;
        for (const int64_t length : source.stored->shape) values *= length;
        bytes += std::min(values, kChunkValues) * 4;
      }
      most = std::max(most, bytes);
    }
  // a chunk of a page or less is a page
  return round_up(most, kRecordAlignment) + impl_->files.staging_bytes();
}

void ModelFile::read_tensor(const std::string& name, const at::Tensor& to) const {
  const auto it = impl_->tensors.find(name);
  if (it == impl_->tensors.end())
    throw std::invalid_argument(fmt::format("{}: no tensor {}", show(path()), name));
  const StoredTensor& stored = it->second;
  if (impl_->stored_quant && is_quantized_name(name))
    throw std::invalid_argument(fmt::format("{}: {} is quantised", show(path()), name));
  if (!to.device().is_cpu() || !to.is_contiguous() || !to.sizes().equals(stored.shape))
    throw std::invalid_argument(fmt::format("{}: {} has shape {}, a tensor of {} was given",
                                            show(path()),
                                            name,
                                            shape_text(stored.shape),
                                            shape_text(to)));
  if (to.numel() > 0)
    impl_->files.read_values(
        stored, 0, to.numel(), to.scalar_type(), static_cast<std::byte*>(to.data_ptr()));
}

Sha256Digest ModelFile::weights_sha256(bool rehash) const {
  return impl_->files.weights_sha256("flux", impl_->tensors, rehash);
}

}  // namespace flux::engine
