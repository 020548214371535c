#include "formats/safetensors/writer.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "common/core/text.h"

namespace flux::safetensors {
namespace {

constexpr std::string_view kMetadataKey = "__metadata__";

void check_text(std::string_view what, std::string_view text) {
  if (first_invalid_utf8(text))
    throw std::invalid_argument(fmt::format("{} '{}' is not UTF-8", what, printable(text)));
}

/// The length word and the padded JSON. Written by hand where order matters: JSON objects of the
/// library sort by key.
std::string header_of(const std::vector<TensorSpec>& order, const Metadata& metadata) {
  std::string json = "{";
  if (!metadata.empty()) {
    for (const auto& [key, value] : metadata) {
      check_text("metadata key", key);
      check_text("metadata value", value);
    }
    json += fmt::format("\"{}\":{}", kMetadataKey, nlohmann::json(metadata).dump());
  }
  uint64_t offset = 0;
  for (const TensorSpec& tensor : order) {
    if (tensor.name == kMetadataKey)
      throw std::invalid_argument("a tensor cannot be called __metadata__");
    check_text("tensor name", tensor.name);
    const uint64_t size = tensor_bytes(tensor.dtype, tensor.shape);
    uint64_t end = 0;
    if (__builtin_add_overflow(offset, size, &end) || end > static_cast<uint64_t>(INT64_MAX)) {
      throw std::invalid_argument(
          fmt::format("tensors up to '{}' have more than 2^63 bytes", printable(tensor.name)));
    }
    json += fmt::format("{}{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                        json.size() > 1 ? "," : "",
                        nlohmann::json(tensor.name).dump(),
                        dtype_name(tensor.dtype),
                        fmt::join(tensor.shape, ","),
                        offset,
                        end);
    offset = end;
  }
  json += "}";
  json.append((8 - json.size() % 8) % 8, ' ');
  if (json.size() > kMaxHeaderBytes) {
    throw std::invalid_argument(
        fmt::format("header of {} bytes, at most {} are allowed", json.size(), kMaxHeaderBytes));
  }
  const auto length = std::bit_cast<std::array<char, 8>>(static_cast<uint64_t>(json.size()));
  return std::string(length.data(), length.size()) + json;
}

}  // namespace

std::vector<TensorSpec> in_file_order(std::vector<TensorSpec> tensors) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorSpec& a, const TensorSpec& b) {
    // larger elements first, so that each tensor's offset is a multiple of its element size
    return std::tuple(-dtype_bits(a.dtype), a.dtype, std::string_view(a.name)) <
           std::tuple(-dtype_bits(b.dtype), b.dtype, std::string_view(b.name));
  });
  std::vector<std::string_view> names;
  for (const TensorSpec& tensor : tensors) names.push_back(tensor.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end())
    throw std::invalid_argument(fmt::format("tensor '{}' is given twice", printable(*twice)));
  return tensors;
}

std::string header_bytes(std::vector<TensorSpec> tensors, const Metadata& metadata) {
  return header_of(in_file_order(std::move(tensors)), metadata);
}

Metadata pt_metadata() { return {{"format", "pt"}}; }

Writer::Writer(std::filesystem::path path,
               std::vector<TensorSpec> tensors,
               const Metadata& metadata)
    : order_(in_file_order(std::move(tensors))),
      header_(header_of(order_, metadata)),
      file_(std::move(path)) {
  file_.write(header_);
  skip_full();
}

void Writer::skip_full() {
  // a tensor of no bytes needs no write()
  while (next_ < order_.size() &&
         written_ == tensor_bytes(order_[next_].dtype, order_[next_].shape)) {
    ++next_;
    written_ = 0;
  }
}

void Writer::write(std::string_view name, std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  if (next_ == order_.size() || order_[next_].name != name) {
    throw std::invalid_argument(
        fmt::format("tensor '{}' was written where {} is next",
                    printable(name),
                    next_ == order_.size() ? "nothing" : printable(order_[next_].name)));
  }
  const uint64_t size = tensor_bytes(order_[next_].dtype, order_[next_].shape);
  if (bytes.size() > size - written_) {
    throw std::invalid_argument(fmt::format(
        "tensor '{}' has {} bytes, {} were given", printable(name), size, written_ + bytes.size()));
  }
  file_.write(bytes);
  written_ += bytes.size();
  skip_full();
}

void Writer::commit() {
  if (next_ != order_.size()) {
    throw std::invalid_argument(
        fmt::format("tensor '{}' was not written in full", printable(order_[next_].name)));
  }
  file_.commit();
}

ScatteredWriter::ScatteredWriter(std::filesystem::path path,
                                 std::vector<TensorSpec> tensors,
                                 const Metadata& metadata)
    : header_(header_bytes(tensors, metadata)), file_(std::move(path)) {
  file_.write(header_);
  uint64_t offset = header_.size();
  for (const TensorSpec& tensor : in_file_order(std::move(tensors))) {
    const uint64_t bytes = tensor_bytes(tensor.dtype, tensor.shape);
    if (bytes > 0) places_[tensor.name] = {offset, bytes};
    offset += bytes;
  }
}

void ScatteredWriter::write(std::string_view name, std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  const auto place = places_.find(name);
  if (place == places_.end())
    throw std::invalid_argument(
        fmt::format("tensor '{}' is not in the file, or was written before", printable(name)));
  if (bytes.size() != place->second.bytes)
    throw std::invalid_argument(fmt::format("tensor '{}' has {} bytes, {} were given",
                                            printable(name),
                                            place->second.bytes,
                                            bytes.size()));
  file_.write_at(place->second.offset, bytes);
  places_.erase(place);
}

void ScatteredWriter::commit() {
  if (!places_.empty())
    throw std::invalid_argument(
        fmt::format("tensor '{}' was not written", printable(places_.begin()->first)));
  file_.commit();
}

}  // namespace flux::safetensors
