// common/quant/format.h - the ways to store a weight in 8 or 4 bits, by name. No LibTorch.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace flux {

/// kFp8: 8 bits an element, e4m3, a scale for 64 neighbours of a row. An element is code * scale;
/// scale = largest magnitude of the 64 / 448, at least 1e-12. The last block of a row may be short.
///
/// kNf4: 4 bits an element, a scale for 64 neighbours of the weight read row by row. An element is
/// table[code] * scale; scale = largest magnitude. Bits, ties and scales are those of
/// bitsandbytes.functional.quantize_4bit(quant_type="nf4", blocksize=64).
enum class QuantFormat : int64_t { kFp8, kNf4 };

inline constexpr int64_t kQuantBlock = 64;

/// "fp8", "nf4": the words of flags.
std::string_view quant_format_name(QuantFormat format);
/// Throws UsageError for another word.
QuantFormat parse_quant_format(const std::string& word);

}  // namespace flux
