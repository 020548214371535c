// common/quant/quant.h - frozen weights in 8 or 4 bits: what they are in memory and in files, and the
// way there and back.
//
// For a loader:
//   if (is_quantized_name(name)) w = quantize(to_dtype(tensor, at::kBFloat16), QuantFormat::kFp8);
// and of a file that `flux-model convert --quantize` wrote, which gives the same bits:
//   const auto stored = stored_quant_format(file.metadata, path);  // nothing: plain weights
//   if (stored && is_quantized_name(name)) w = stored_weight(tensors, name, *stored, path);
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/quant/format.h"
#include "common/tensor/fwd.h"

namespace flux {

/// A weight [out, in] in 8 or 4 bits. Copies share the tensors; undefined until made.
///
///   codes   kFp8: float8_e4m3fn [out, in]
///           kNf4: uint8 [out, in / 2]; the high half of a byte is the element with the even index
///   scales  kFp8: float32 [out, ceil(in / 64)]
///           kNf4: float32 [ceil(out * in / 64)]
///
/// Both contiguous, on one device.
struct QuantizedWeight {
  QuantFormat format = QuantFormat::kFp8;
  at::Tensor codes, scales;

  bool defined() const { return codes.defined(); }
  int64_t out() const;
  int64_t in() const;
  QuantizedWeight to(const at::Device& device) const;
};

/// Shapes and sizes, for buffers made beforehand and for plans. Throws std::invalid_argument for an
/// odd `in` with kNf4.
struct QuantizedLayout {
  c10::ScalarType codes_type{};
  std::vector<int64_t> codes_shape, scales_shape;
  int64_t codes_bytes = 0, scales_bytes = 0;
  int64_t bytes() const { return codes_bytes + scales_bytes; }
};
QuantizedLayout quantized_layout(QuantFormat format, int64_t out, int64_t in);

/// An undefined-content QuantizedWeight of that layout on `device` (Meta too).
QuantizedWeight empty_quantized(QuantFormat format, int64_t out, int64_t in, at::Device device);

/// `weight` [out, in] float32|bfloat16 in 8 or 4 bits, on its device. Infinities and NaN make the
/// scale of their block infinite or NaN: see is_finite.
QuantizedWeight quantize(const at::Tensor& weight, QuantFormat format);
/// The same into tensors that are there: a slot of a ring.
void quantize_into(const at::Tensor& weight, const QuantizedWeight& out);
/// Whether all scales are finite, so that no weight was NaN or infinite. CPU only.
bool is_finite(const QuantizedWeight& weight);

/// Into `out` [out, in] float32|bfloat16, contiguous, on the device of `weight`: the product in
/// float32, then rounded to nearest even. Not differentiable.
void dequantize_into(const QuantizedWeight& weight, const at::Tensor& out);
at::Tensor dequantize(const QuantizedWeight& weight, c10::ScalarType type);

// --- files

/// Of a tensor under its BFL name: whether it is quantised. These are the weights of all Linear
/// layers in double_blocks and single_blocks, modulation too; biases, the scales of the q and k
/// norms, and everything outside the blocks stay bfloat16.
bool is_quantized_name(std::string_view bfl_name);

/// The name of a stored weight's scales: "X.weight" -> "X.weight_scale".
std::string scale_name(std::string_view weight_name);

/// What a file's metadata says, under kQuantMetadataKey: "fp8_e4m3_block64" or "nf4_block64".
/// Throws InputError for other words there.
inline constexpr std::string_view kQuantMetadataKey = "flux_stages.quantization";
std::optional<QuantFormat> stored_quant_format(const std::map<std::string, std::string>& metadata,
                                               const std::filesystem::path& path);
std::string_view stored_quant_name(QuantFormat format);

/// Codes and scales of `name` ("double_blocks.0.img_attn.qkv.weight") among a file's tensors, not
/// copied: views of the mapped file. Throws InputError if one is missing or their dtypes or shapes
/// are not those of `format`.
///   path  for messages
QuantizedWeight stored_weight(const TensorMap& tensors,
                              const std::string& name,
                              QuantFormat format,
                              const std::filesystem::path& path);

}  // namespace flux
