#include "common/engine/record_layout.h"

#include <fmt/format.h>

#include <stdexcept>

#include "common/models/flux/names.h"
#include "common/tensor/tensor.h"

namespace flux::engine {
namespace {

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace

size_t RecordLayout::add(std::string name, std::vector<int64_t> shape, c10::ScalarType dtype) {
  if (find(name))
    throw std::invalid_argument(fmt::format("RecordLayout: {} is there already", name));
  auto bytes = static_cast<int64_t>(c10::elementSize(dtype));
  for (const int64_t length : shape) {
    if (length < 0)
      throw std::invalid_argument(
          fmt::format("RecordLayout: {} of shape {}", name, shape_text(shape)));
    bytes *= length;
  }
  const int64_t offset = slices_.empty() ? 0 : round_up(slices_.back().end(), kSliceAlignment);
  slices_.push_back({std::move(name), std::move(shape), dtype, offset, bytes});
  return slices_.size() - 1;
}

int64_t RecordLayout::bytes() const {
  return slices_.empty() ? 0 : round_up(slices_.back().end(), kRecordAlignment);
}

std::optional<size_t> RecordLayout::find(std::string_view name) const {
  for (size_t i = 0; i < slices_.size(); ++i)
    if (slices_[i].name == name) return i;
  return std::nullopt;
}

at::Tensor RecordLayout::view(const at::Tensor& record, size_t index) const {
  if (record.scalar_type() != at::kByte || record.dim() != 1 || record.size(0) < bytes() ||
      !record.is_contiguous())
    throw std::invalid_argument(
        fmt::format("RecordLayout: a record of {} bytes is needed, not {} {}",
                    bytes(),
                    c10::toString(record.scalar_type()),
                    shape_text(record)));
  const Slice& slice = slices_.at(index);
  return record.narrow(0, slice.offset, slice.bytes)
      .view(slice.dtype)
      .view(slice.shape)
      .variable_data();
}

at::Tensor RecordLayout::view(const at::Tensor& record, std::string_view name) const {
  const auto index = find(name);
  if (!index) throw std::invalid_argument(fmt::format("RecordLayout: no slice {}", name));
  return view(record, *index);
}

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

}  // namespace flux::engine
