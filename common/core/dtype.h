// common/core/dtype.h - the element types of files, by their safetensors names.
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

namespace flux {

/// Element types that a safetensors file can hold. Order is of no meaning.
/// Source: huggingface/safetensors, README.md; F8_E4M3 is e4m3fn (largest 448, no infinities).
enum class DType : uint8_t {
  kBool,
  kU8,
  kI8,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kF64,
  kI64,
  kU64,
  kC64,
  kF8E4M3,
  kF8E5M2,
  kF8E8M0,
  kF8E4M3FNUZ,
  kF8E5M2FNUZ,
  kF4,
  kF6E2M3,
  kF6E3M2,
};

/// Size of one element in bits; F4 and F6 are below a byte.
int64_t dtype_bits(DType dtype);
/// The name in a safetensors header, "BF16" for one.
std::string_view dtype_name(DType dtype);
std::optional<DType> dtype_from_name(std::string_view name);

}  // namespace flux
