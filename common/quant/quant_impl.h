// common/quant/quant_impl.h - what the faces of flux::quantize_weight and flux::dequantize_weight
// share. For quant.cpp and libflux_cuda.so.
#pragma once
#include <ATen/core/Tensor.h>

#include "common/quant/quant.h"
#include "common/quant/quant_kernel.h"

namespace flux::kernel {

/// The blocks of a weight [out, in]; `format` is a QuantFormat.
inline QuantBlocks quant_blocks(const at::Tensor& weight, int64_t format) {
  return format == static_cast<int64_t>(QuantFormat::kFp8)
             ? QuantBlocks{weight.size(0), weight.size(1), kQuantBlock}
             : QuantBlocks{1, weight.numel(), kQuantBlock};
}

}  // namespace flux::kernel
