// formats/cache/tables.h - columns of plain values <-> tables of a file.
#pragma once
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "common/core/dtype.h"
#include "formats/cache/hdf5_file.h"

namespace flux::cache {

template <class T>
constexpr Element element_of() {
  if constexpr (std::is_same_v<T, uint32_t>)
    return Element::kU32;
  else if constexpr (std::is_same_v<T, uint64_t>)
    return Element::kU64;
  else if constexpr (std::is_same_v<T, double>)
    return Element::kF64;
  else
    return Element::kU8;
}

inline Element element_of(DType dtype) {
  return dtype == DType::kBF16  ? Element::kBF16
         : dtype == DType::kF16 ? Element::kF16
                                : Element::kF32;
}

/// Writes column `name`: of each row what `get` returns, a number or an std::array of numbers or
/// bytes.
template <class Row, class Get>
void write_column(Hdf5Image& image, const std::string& name, std::span<const Row> rows, Get get) {
  using Value = std::decay_t<decltype(get(rows[0]))>;
  std::vector<Value> values;
  values.reserve(rows.size());
  for (const Row& row : rows) values.push_back(get(row));
  const auto bytes = std::as_bytes(std::span(values));
  const auto num_rows = static_cast<int64_t>(rows.size());
  if constexpr (std::is_arithmetic_v<Value>)
    image.table(name, element_of<Value>(), num_rows, 0, bytes);
  else
    image.table(
        name, element_of<typename Value::value_type>(), num_rows, std::tuple_size_v<Value>, bytes);
}

/// Reads column `name` of exactly rows.size() rows and calls set(row, value).
template <class Value, class Row, class Set>
void read_column(const Hdf5File& file, const std::string& name, std::span<Row> rows, Set set) {
  const auto num_rows = static_cast<int64_t>(rows.size());
  std::vector<std::byte> bytes;
  if constexpr (std::is_arithmetic_v<Value>)
    bytes = file.table(name, element_of<Value>(), num_rows, 0);
  else
    bytes = file.table(
        name, element_of<typename Value::value_type>(), num_rows, std::tuple_size_v<Value>);
  for (size_t i = 0; i < rows.size(); ++i) {
    Value value;
    std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
    set(rows[i], value);
  }
}

/// Texts of any bytes: NAME_offset [n + 1] and NAME_bytes, whose last byte is one zero behind the
/// last text, so that it is never empty. `text(i)` returns row i's.
template <class Text>
void write_texts(Hdf5Image& image, const std::string& name, size_t count, Text text) {
  std::vector<uint64_t> offsets{0};
  std::string all;
  for (size_t i = 0; i < count; ++i) {
    all += text(i);
    offsets.push_back(all.size());
  }
  all += '\0';
  image.table(name + "_offset",
              Element::kU64,
              static_cast<int64_t>(offsets.size()),
              0,
              std::as_bytes(std::span(offsets)));
  image.table(name + "_bytes",
              Element::kU8,
              static_cast<int64_t>(all.size()),
              0,
              std::as_bytes(std::span(all)));
}

struct Texts {
  std::vector<uint64_t> offsets;
  std::string bytes;
  std::string_view at(size_t i) const {
    return std::string_view(bytes).substr(offsets[i], offsets[i + 1] - offsets[i]);
  }
};

/// Refuses offsets that do not start at 0, decrease, or do not end at the last byte.
inline Texts read_texts(const Hdf5File& file,
                        const std::string& name,
                        size_t count,
                        int64_t max_bytes) {
  Texts out;
  const auto offsets =
      file.table(name + "_offset", Element::kU64, static_cast<int64_t>(count) + 1, 0);
  const auto bytes = file.table(name + "_bytes", Element::kU8, -1, 0, max_bytes);
  out.offsets.resize(count + 1);
  std::memcpy(out.offsets.data(), offsets.data(), offsets.size());
  out.bytes.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  bool ordered = out.offsets.front() == 0 && out.offsets.back() + 1 == bytes.size() &&
                 out.bytes.back() == '\0';
  for (size_t i = 0; i < count; ++i) ordered = ordered && out.offsets[i] <= out.offsets[i + 1];
  if (!ordered) file.refuse("the offsets in '" + name + "_offset' do not fit '" + name + "_bytes'");
  return out;
}

}  // namespace flux::cache
