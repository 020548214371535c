// common/quant/quant.cpp - checks, dispatch and the CPU face of the ops flux::quantize_weight and
// flux::dequantize_weight.
#include "common/quant/quant.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "common/quant/quant_cpu.h"
#include "common/quant/quant_impl.h"
#include "common/tensor/tensor.h"

namespace flux {
namespace {

// Fewer blocks than this are not worth a second thread.
constexpr int64_t kBlocksPerThread = 512;

void quantize_cpu(const at::Tensor& weight,
                  int64_t format,
                  const at::Tensor& codes,
                  const at::Tensor& scales) {
  const auto blocks = kernel::quant_blocks(weight, format);
  const auto run = [&]<class T>(T) {
    const auto* values = static_cast<const T*>(weight.const_data_ptr());
    auto* to = static_cast<uint8_t*>(codes.data_ptr());
    auto* scale = scales.mutable_data_ptr<float>();
    at::parallel_for(0, blocks.count(), kBlocksPerThread, [&](int64_t first, int64_t last) {
      if (format == static_cast<int64_t>(QuantFormat::kFp8))
        kernel::fp8_quantize_cpu(blocks, first, last, values, to, scale);
      else
        kernel::nf4_quantize_cpu(blocks, first, last, values, to, scale);
    });
  };
  weight.scalar_type() == at::kBFloat16 ? run(kernel::Bf16Bits{}) : run(float{});
}

void dequantize_cpu(const at::Tensor& codes,
                    const at::Tensor& scales,
                    int64_t format,
                    const at::Tensor& out) {
  const auto blocks = kernel::quant_blocks(out, format);
  const auto run = [&]<class T>(T) {
    auto* values = static_cast<T*>(out.data_ptr());
    const auto* from = static_cast<const uint8_t*>(codes.const_data_ptr());
    const auto* scale = scales.const_data_ptr<float>();
    at::parallel_for(0, blocks.count(), kBlocksPerThread, [&](int64_t first, int64_t last) {
      if (format == static_cast<int64_t>(QuantFormat::kFp8))
        kernel::fp8_dequantize_cpu(blocks, first, last, from, scale, values);
      else
        kernel::nf4_dequantize_cpu(blocks, first, last, from, scale, values);
    });
  };
  out.scalar_type() == at::kBFloat16 ? run(kernel::Bf16Bits{}) : run(float{});
}

void quantize_meta(const at::Tensor&, int64_t, const at::Tensor&, const at::Tensor&) {}
void dequantize_meta(const at::Tensor&, const at::Tensor&, int64_t, const at::Tensor&) {}

TORCH_LIBRARY_FRAGMENT(flux, library) {
  library.def(
      "quantize_weight(Tensor weight, int format, Tensor(a!) codes, Tensor(b!) scales) -> ()");
  library.def("dequantize_weight(Tensor codes, Tensor scales, int format, Tensor(a!) out) -> ()");
}
TORCH_LIBRARY_IMPL(flux, CPU, library) {
  library.impl("quantize_weight", quantize_cpu);
  library.impl("dequantize_weight", dequantize_cpu);
}
TORCH_LIBRARY_IMPL(flux, Meta, library) {
  library.impl("quantize_weight", quantize_meta);
  library.impl("dequantize_weight", dequantize_meta);
}

[[noreturn]] void refuse(std::string_view what, const at::Tensor& tensor) {
  throw std::invalid_argument(fmt::format("quantised weight: {} is {} {}",
                                          what,
                                          shape_text(tensor),
                                          c10::toString(tensor.scalar_type())));
}

void check_plain(std::string_view what, const at::Tensor& tensor) {
  if (tensor.dim() != 2 || !tensor.is_contiguous() ||
      (tensor.scalar_type() != at::kFloat && tensor.scalar_type() != at::kBFloat16))
    refuse(what, tensor);
}

/// Throws unless codes and scales are those of a weight of the size of `plain`, on its device.
void check_fits(const QuantizedWeight& weight, const at::Tensor& plain) {
  const auto layout = quantized_layout(weight.format, plain.size(0), plain.size(1));
  const auto fits = [&](const at::Tensor& tensor, c10::ScalarType type, const auto& shape) {
    return tensor.defined() && tensor.scalar_type() == type && tensor.sizes().equals(shape) &&
           tensor.is_contiguous() && tensor.device() == plain.device();
  };
  if (!fits(weight.codes, layout.codes_type, layout.codes_shape) ||
      !fits(weight.scales, at::kFloat, layout.scales_shape)) {
    throw std::invalid_argument(
        fmt::format("quantised weight: codes {} and scales {} of {} do not fit a weight {}",
                    weight.codes.defined() ? shape_text(weight.codes) : "none",
                    weight.scales.defined() ? shape_text(weight.scales) : "none",
                    quant_format_name(weight.format),
                    shape_text(plain)));
  }
}

}  // namespace

std::string_view quant_format_name(QuantFormat format) {
  return format == QuantFormat::kFp8 ? "fp8" : "nf4";
}

int64_t QuantizedWeight::out() const { return codes.size(0); }
int64_t QuantizedWeight::in() const {
  return format == QuantFormat::kFp8 ? codes.size(1) : codes.size(1) * 2;
}
QuantizedWeight QuantizedWeight::to(const at::Device& device) const {
  return {format, codes.to(device), scales.to(device)};
}

QuantizedLayout quantized_layout(QuantFormat format, int64_t out, int64_t in) {
  if (out < 0 || in < 0) throw std::invalid_argument("quantised weight: negative size");
  QuantizedLayout layout;
  if (format == QuantFormat::kFp8) {
    const int64_t per_row = (in + kQuantBlock - 1) / kQuantBlock;
    layout = {at::kFloat8_e4m3fn, {out, in}, {out, per_row}, out * in, out * per_row * 4};
  } else {
    if (in % 2 != 0)
      throw std::invalid_argument(fmt::format("nf4: rows of {} values, an odd number", in));
    const int64_t count = (out * in + kQuantBlock - 1) / kQuantBlock;
    layout = {at::kByte, {out, in / 2}, {count}, out * in / 2, count * 4};
  }
  return layout;
}

QuantizedWeight empty_quantized(QuantFormat format, int64_t out, int64_t in, at::Device device) {
  const auto layout = quantized_layout(format, out, in);
  return {format,
          at::empty(layout.codes_shape, at::device(device).dtype(layout.codes_type)),
          at::empty(layout.scales_shape, at::device(device).dtype(at::kFloat))};
}

QuantizedWeight quantize(const at::Tensor& weight, QuantFormat format) {
  check_plain("weight", weight);
  auto out = empty_quantized(format, weight.size(0), weight.size(1), weight.device());
  quantize_into(weight, out);
  return out;
}

void quantize_into(const at::Tensor& weight, const QuantizedWeight& out) {
  check_plain("weight", weight);
  check_fits(out, weight);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flux::quantize_weight", "")
                             .typed<decltype(quantize_cpu)>();
  const at::AutoDispatchBelowADInplaceOrView below;
  op.call(weight, static_cast<int64_t>(out.format), out.codes, out.scales);
}

bool is_finite(const QuantizedWeight& weight) {
  const auto scales = weight.scales.contiguous();
  const auto* data = scales.const_data_ptr<float>();
  return std::all_of(data, data + scales.numel(), [](float scale) { return std::isfinite(scale); });
}

void dequantize_into(const QuantizedWeight& weight, const at::Tensor& out) {
  check_plain("result", out);
  check_fits(weight, out);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flux::dequantize_weight", "")
                             .typed<decltype(dequantize_cpu)>();
  const at::AutoDispatchBelowADInplaceOrView below;
  op.call(weight.codes, weight.scales, static_cast<int64_t>(weight.format), out);
}

at::Tensor dequantize(const QuantizedWeight& weight, c10::ScalarType type) {
  auto out = at::empty({weight.out(), weight.in()}, weight.scales.options().dtype(type));
  dequantize_into(weight, out);
  return out;
}

}  // namespace flux
