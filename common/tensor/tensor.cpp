#include "common/tensor/tensor.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <fmt/format.h>

#include <cstring>
#include <stdexcept>

#include "common/core/text.h"

namespace flux {
namespace {

using c10::ScalarType;

struct Row {
  DType dtype;
  ScalarType type;
};
constexpr Row kRows[] = {
    {DType::kBool, ScalarType::Bool},
    {DType::kU8, ScalarType::Byte},
    {DType::kI8, ScalarType::Char},
    {DType::kI16, ScalarType::Short},
    {DType::kU16, ScalarType::UInt16},
    {DType::kF16, ScalarType::Half},
    {DType::kBF16, ScalarType::BFloat16},
    {DType::kI32, ScalarType::Int},
    {DType::kU32, ScalarType::UInt32},
    {DType::kF32, ScalarType::Float},
    {DType::kF64, ScalarType::Double},
    {DType::kI64, ScalarType::Long},
    {DType::kU64, ScalarType::UInt64},
    {DType::kC64, ScalarType::ComplexFloat},
    {DType::kF8E4M3, ScalarType::Float8_e4m3fn},
    {DType::kF8E5M2, ScalarType::Float8_e5m2},
    {DType::kF8E8M0, ScalarType::Float8_e8m0fnu},
    {DType::kF8E4M3FNUZ, ScalarType::Float8_e4m3fnuz},
    {DType::kF8E5M2FNUZ, ScalarType::Float8_e5m2fnuz},
};

}  // namespace

std::optional<ScalarType> scalar_type(DType dtype) {
  for (const Row& row : kRows) {
    if (row.dtype == dtype) return row.type;
  }
  return std::nullopt;
}

DType dtype_of(ScalarType type) {
  for (const Row& row : kRows) {
    if (row.type == type) return row.dtype;
  }
  throw std::invalid_argument(fmt::format("no file holds tensors of type {}", c10::toString(type)));
}

DType dtype_of(const at::Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

std::string shape_text(const at::Tensor& tensor) {
  return shape_text(std::span<const int64_t>(tensor.sizes()));
}

void check_shape(std::string_view name,
                 const at::Tensor& tensor,
                 std::span<const int64_t> expected) {
  bool equal = static_cast<size_t>(tensor.dim()) == expected.size();
  for (size_t i = 0; equal && i < expected.size(); ++i) {
    equal = expected[i] == -1 || expected[i] == tensor.size(static_cast<int64_t>(i));
  }
  if (!equal) {
    throw std::invalid_argument(fmt::format(
        "{} has shape {}, expected {}", name, shape_text(tensor), shape_text(expected)));
  }
}

void check_shape(std::string_view name,
                 const at::Tensor& tensor,
                 std::initializer_list<int64_t> expected) {
  check_shape(name, tensor, std::span(expected.begin(), expected.size()));
}

at::Tensor borrow(std::span<const std::byte> bytes,
                  DType dtype,
                  std::span<const int64_t> shape,
                  std::shared_ptr<const void> owner) {
  const auto type = scalar_type(dtype);
  if (!type) throw std::invalid_argument(fmt::format("no tensor type for {}", dtype_name(dtype)));
  const size_t element_bytes = static_cast<size_t>(dtype_bits(dtype)) / 8;
  size_t expected = element_bytes, extent = element_bytes;  // extent: what strides are made of
  bool fits = true;
  for (const int64_t length : shape) {
    const auto n = static_cast<size_t>(length);
    fits = fits && length >= 0 && !__builtin_mul_overflow(expected, n, &expected) &&
           !__builtin_mul_overflow(extent, std::max<size_t>(n, 1), &extent) &&
           extent <= size_t{INT64_MAX};
  }
  if (!fits || expected != bytes.size()) {
    throw std::invalid_argument(fmt::format(
        "{} {} does not fit in {} bytes", dtype_name(dtype), shape_text(shape), bytes.size()));
  }
  const auto options = at::TensorOptions(*type);
  const at::IntArrayRef sizes(shape.data(), shape.size());
  const auto address = reinterpret_cast<uintptr_t>(bytes.data());
  if (bytes.empty() || address % element_bytes != 0) {
    at::Tensor copy = at::empty(sizes, options);
    if (!bytes.empty()) std::memcpy(copy.mutable_data_ptr(), bytes.data(), bytes.size());
    return copy;
  }
  return at::from_blob(
      const_cast<std::byte*>(bytes.data()),
      sizes,
      [owner = std::move(owner)](void*) mutable { owner.reset(); },
      options);
}

template <class T>
at::Tensor from_values(std::span<const T> values, std::span<const int64_t> shape) {
  at::Tensor tensor =
      at::empty(at::IntArrayRef(shape.data(), shape.size()), c10::CppTypeToScalarType<T>::value);
  if (tensor.numel() != static_cast<int64_t>(values.size())) {
    throw std::invalid_argument(
        fmt::format("{} values for shape {}", values.size(), shape_text(shape)));
  }
  if (!values.empty()) std::memcpy(tensor.mutable_data_ptr(), values.data(), values.size_bytes());
  return tensor;
}
template at::Tensor from_values(std::span<const float>, std::span<const int64_t>);
template at::Tensor from_values(std::span<const double>, std::span<const int64_t>);
template at::Tensor from_values(std::span<const int64_t>, std::span<const int64_t>);
template at::Tensor from_values(std::span<const int32_t>, std::span<const int64_t>);
template at::Tensor from_values(std::span<const uint8_t>, std::span<const int64_t>);

std::span<const std::byte> host_bytes(const at::Tensor& tensor) {
  if (!tensor.device().is_cpu() || !tensor.is_contiguous()) {
    throw std::invalid_argument("host_bytes needs a contiguous CPU tensor, got one of shape " +
                                shape_text(tensor));
  }
  return {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()};
}

at::Tensor to_dtype(const at::Tensor& tensor, ScalarType type) { return tensor.to(type); }

}  // namespace flux
