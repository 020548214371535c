#include "formats/safetensors/writer.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <iterator>
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
    : path_(std::move(path)),
      header_(header_bytes(tensors, metadata)),
      data_begin_(header_.size()),
      file_(path_) {
  file_.write(header_);
  place(std::move(tensors));
}

ScatteredWriter::ScatteredWriter(std::filesystem::path path,
                                 std::vector<TensorSpec> tensors,
                                 const Shared& shared)
    : path_(std::move(path)),
      data_begin_(shared.data_begin),
      file_(path_, path_.parent_path() / shared.temporary) {
  place(std::move(tensors));
}

void ScatteredWriter::place(std::vector<TensorSpec> tensors) {
  for (const TensorSpec& tensor : in_file_order(std::move(tensors))) {
    const uint64_t bytes = tensor_bytes(tensor.dtype, tensor.shape);
    places_[tensor.name] = {data_bytes_, bytes};
    data_bytes_ += bytes;
  }
}

const ScatteredWriter::Place& ScatteredWriter::place_of(std::string_view name) const {
  const auto place = places_.find(name);
  if (place == places_.end())
    throw std::invalid_argument(fmt::format("tensor '{}' is not in the file", printable(name)));
  return place->second;
}

std::string_view ScatteredWriter::tensor_at(uint64_t at) const {
  for (const auto& [name, place] : places_)
    if (at >= place.begin && at - place.begin < place.bytes) return name;
  return {};
}

void ScatteredWriter::claim(Range range) {
  if (range.begin >= range.end) return;
  auto after = written_.lower_bound(range.begin);
  const auto before = after == written_.begin() ? written_.end() : std::prev(after);
  const auto twice = [&](uint64_t at) {
    throw std::invalid_argument(
        fmt::format("{}: tensor '{}' is written twice", show(path_), printable(tensor_at(at))));
  };
  if (before != written_.end() && before->second > range.begin) twice(range.begin);
  if (after != written_.end() && after->first < range.end) twice(after->first);
  if (after != written_.end() && after->first == range.end) {
    range.end = after->second;
    written_.erase(after);
  }
  if (before != written_.end() && before->second == range.begin)
    before->second = range.end;
  else
    written_[range.begin] = range.end;
}

void ScatteredWriter::write(std::string_view name, std::span<const std::byte> bytes) {
  const Place& place = place_of(name);
  if (bytes.size() != place.bytes)
    throw std::invalid_argument(fmt::format(
        "tensor '{}' has {} bytes, {} were given", printable(name), place.bytes, bytes.size()));
  write_part(name, 0, bytes);
}

void ScatteredWriter::write_part(std::string_view name,
                                 uint64_t first,
                                 std::span<const std::byte> bytes) {
  const Place& place = place_of(name);
  if (first > place.bytes || bytes.size() > place.bytes - first)
    throw std::invalid_argument(fmt::format("tensor '{}' has {} bytes, {} were given from {} on",
                                            printable(name),
                                            place.bytes,
                                            bytes.size(),
                                            first));
  const uint64_t begin = place.begin + first;
  claim({begin, begin + bytes.size()});
  file_.write_at(data_begin_ + begin, bytes);
}

ScatteredWriter::Shared ScatteredWriter::share() {
  return {file_.share(data_begin_ + data_bytes_).filename().native(), data_begin_};
}

std::vector<ScatteredWriter::Range> ScatteredWriter::leave() {
  file_.leave();
  std::vector<Range> ranges;
  for (const auto& [begin, end] : written_) ranges.push_back({begin, end});
  return ranges;
}

void ScatteredWriter::add_written(std::span<const Range> ranges) {
  for (const Range& range : ranges) claim(range);
}

void ScatteredWriter::commit() {
  uint64_t bytes = 0;
  for (const auto& [begin, end] : written_) bytes += end - begin;
  if (bytes != data_bytes_) {
    const uint64_t hole =
        written_.empty() || written_.begin()->first > 0 ? 0 : written_.begin()->second;
    throw std::invalid_argument(
        fmt::format("{}: {} bytes of {} were written, tensor '{}' is not whole",
                    show(path_),
                    bytes,
                    data_bytes_,
                    printable(tensor_at(hole))));
  }
  file_.commit();
}

}  // namespace flux::safetensors
