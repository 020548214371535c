// common/quant/quant_files.cpp - quantised weights under their names in files.
#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/quant/quant.h"
#include "common/tensor/tensor.h"

namespace flux {

QuantFormat parse_quant_format(const std::string& word) {
  for (const QuantFormat format : {QuantFormat::kFp8, QuantFormat::kNf4})
    if (word == quant_format_name(format)) return format;
  throw UsageError("'" + printable(word) + "' is not one of fp8|nf4");
}

std::string_view stored_quant_name(QuantFormat format) {
  return format == QuantFormat::kFp8 ? "fp8_e4m3_block64" : "nf4_block64";
}

bool is_quantized_name(std::string_view bfl_name) {
  return (bfl_name.starts_with("double_blocks.") || bfl_name.starts_with("single_blocks.")) &&
         bfl_name.ends_with(".weight");
}

std::string scale_name(std::string_view weight_name) { return std::string(weight_name) + "_scale"; }

std::optional<QuantFormat> stored_quant_format(const std::map<std::string, std::string>& metadata,
                                               const std::filesystem::path& path) {
  const auto it = metadata.find(std::string(kQuantMetadataKey));
  if (it == metadata.end()) return std::nullopt;
  for (const QuantFormat format : {QuantFormat::kFp8, QuantFormat::kNf4})
    if (it->second == stored_quant_name(format)) return format;
  throw InputError(fmt::format("{}: {} is '{}', known are {} and {}",
                               show(path),
                               kQuantMetadataKey,
                               printable(it->second),
                               stored_quant_name(QuantFormat::kFp8),
                               stored_quant_name(QuantFormat::kNf4)),
                   "make it anew: flux-model convert --quantize fp8");
}

QuantizedWeight stored_weight(const TensorMap& tensors,
                              const std::string& name,
                              QuantFormat format,
                              const std::filesystem::path& path) {
  constexpr const char* kHint = "the file is damaged: make it anew with flux-model convert";
  const auto find = [&](const std::string& wanted) {
    const auto it = tensors.find(wanted);
    if (it == tensors.end())
      throw InputError(fmt::format("{}: tensor {} is missing", show(path), wanted), kHint);
    return it->second;
  };
  const QuantizedWeight weight{format, find(name), find(scale_name(name))};
  const auto expect =
      [&](const std::string& which, const at::Tensor& tensor, c10::ScalarType type, auto shape) {
        if (tensor.scalar_type() == type && tensor.sizes().equals(shape)) return;
        throw InputError(fmt::format("{}: {} is {} {}, {} needs {} {}",
                                     show(path),
                                     which,
                                     dtype_name(dtype_of(tensor)),
                                     shape_text(tensor),
                                     stored_quant_name(format),
                                     dtype_name(dtype_of(type)),
                                     shape_text(shape)),
                         kHint);
      };
  if (weight.codes.dim() != 2)
    throw InputError(
        fmt::format("{}: {} is {}, a matrix is needed", show(path), name, shape_text(weight.codes)),
        kHint);
  const auto layout = quantized_layout(format, weight.out(), weight.in());
  expect(name, weight.codes, layout.codes_type, std::span<const int64_t>(layout.codes_shape));
  expect(
      scale_name(name), weight.scales, at::kFloat, std::span<const int64_t>(layout.scales_shape));
  return weight;
}

}  // namespace flux
