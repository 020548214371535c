// common/quant/quant_cpu.h - the CPU kernels of fp8 and NF4, on plain memory. No LibTorch, so that
// they have their own compiler flags.
#pragma once
#include <cstdint>

#include "common/quant/quant_kernel.h"

namespace flux::kernel {

// Blocks [first, last) of a weight: a thread takes a range. The compiler makes a version for
// AVX-512, AVX2 and plain x86-64, chosen when the program starts; all give the same bits.

/// codes [rows, in], scales [rows, per_row()].
void fp8_quantize_cpu(const QuantBlocks& blocks,
                      int64_t first,
                      int64_t last,
                      const float* values,
                      uint8_t* codes,
                      float* scales);
void fp8_quantize_cpu(const QuantBlocks& blocks,
                      int64_t first,
                      int64_t last,
                      const Bf16Bits* values,
                      uint8_t* codes,
                      float* scales);
void fp8_dequantize_cpu(const QuantBlocks& blocks,
                        int64_t first,
                        int64_t last,
                        const uint8_t* codes,
                        const float* scales,
                        float* out);
void fp8_dequantize_cpu(const QuantBlocks& blocks,
                        int64_t first,
                        int64_t last,
                        const uint8_t* codes,
                        const float* scales,
                        Bf16Bits* out);

/// One row of all n values in blocks of an even length: codes [ceil(n / 2)], scales [per_row()]. Of
/// an odd n the last code's low half is that of zero.
void nf4_quantize_cpu(const QuantBlocks& blocks,
                      int64_t first,
                      int64_t last,
                      const float* values,
                      uint8_t* codes,
                      float* scales);
void nf4_quantize_cpu(const QuantBlocks& blocks,
                      int64_t first,
                      int64_t last,
                      const Bf16Bits* values,
                      uint8_t* codes,
                      float* scales);
void nf4_dequantize_cpu(const QuantBlocks& blocks,
                        int64_t first,
                        int64_t last,
                        const uint8_t* codes,
                        const float* scales,
                        float* out);
void nf4_dequantize_cpu(const QuantBlocks& blocks,
                        int64_t first,
                        int64_t last,
                        const uint8_t* codes,
                        const float* scales,
                        Bf16Bits* out);

}  // namespace flux::kernel
