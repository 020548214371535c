// common/tensor/tensor.h - host memory as at::Tensor and back, dtypes, shape checks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/core/dtype.h"
#include "common/core/text.h"
#include "common/tensor/fwd.h"

namespace flux {

/// The tensor type of a file's dtype; nothing for what LibTorch has no type for (F4, F6).
std::optional<c10::ScalarType> scalar_type(DType dtype);
/// The file's dtype of a tensor type. Throws std::invalid_argument for types that no file holds
/// (quantised, complex double).
DType dtype_of(c10::ScalarType type);
DType dtype_of(const at::Tensor& tensor);

/// "[2, 3]"; for the sizes alone see text.h.
std::string shape_text(const at::Tensor& tensor);
/// Throws std::invalid_argument "NAME has shape [..], expected [..]" unless equal; -1 in `expected`
/// matches any length.
void check_shape(std::string_view name,
                 const at::Tensor& tensor,
                 std::span<const int64_t> expected);
void check_shape(std::string_view name,
                 const at::Tensor& tensor,
                 std::initializer_list<int64_t> expected);

/// A CPU tensor over `bytes` without copying, which keeps `owner` alive; bytes that are not aligned
/// for `dtype` are copied. The memory may be mapped read-only: never write to the tensor in place.
/// Throws std::invalid_argument if the size is not that of dtype and shape, or scalar_type(dtype)
/// is nothing.
at::Tensor borrow(std::span<const std::byte> bytes,
                  DType dtype,
                  std::span<const int64_t> shape,
                  std::shared_ptr<const void> owner);
/// A CPU tensor that holds a copy of `values`; T is float, double, int64_t, int32_t or uint8_t.
template <class T>
at::Tensor from_values(std::span<const T> values, std::span<const int64_t> shape);
/// The memory of a contiguous CPU tensor. Throws std::invalid_argument for any other.
std::span<const std::byte> host_bytes(const at::Tensor& tensor);

/// `tensor` in another dtype; itself if it has it already. float8_e4m3fn and float8_e5m2 are
/// decoded exactly, and rounded to nearest even from float32 when encoded.
at::Tensor to_dtype(const at::Tensor& tensor, c10::ScalarType type);

}  // namespace flux
