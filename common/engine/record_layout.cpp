#include "common/engine/record_layout.h"

#include <fmt/format.h>

#include <stdexcept>

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
  const int64_t offset = slices_.empty() ? 0 : round_up(slices_.back().end(), alignment_);
  slices_.push_back({std::move(name), std::move(shape), dtype, offset, bytes});
  return slices_.size() - 1;
}

int64_t RecordLayout::bytes() const {
  return slices_.empty() ? 0 : round_up(slices_.back().end(), multiple_);
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

}  // namespace flux::engine
