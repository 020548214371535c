#include "common/optim/blockwise8.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

namespace flux {
namespace {

constexpr int kExponents = 7;

/// torch.linspace(0.1, 1, count) in float32: from both ends, so that both are exact, each value rounded once.
std::vector<float> linspace(int count) {
  const float start = 0.1f, end = 1.0f, step = (end - start) / static_cast<float>(count - 1);
  std::vector<float> out;
  for (int i = 0; i < count; ++i) {
    out.push_back(i < count / 2 ? std::fma(step, static_cast<float>(i), start)
                                : std::fma(-step, static_cast<float>(count - i - 1), end));
  }
  return out;
}

void fill_values(bool is_signed, float* values) {
  std::vector<float> all{0.0f, 1.0f};
  for (int i = 0; i < kExponents; ++i) {
    const auto edges = linspace((1 << (is_signed ? i : i + 1)) + 1);
    const auto scale = static_cast<float>(std::pow(10.0, i - (kExponents - 1)));
    for (size_t k = 0; k + 1 < edges.size(); ++k) {
      const float value = scale * ((edges[k] + edges[k + 1]) / 2);
      all.push_back(value);
      if (is_signed) all.push_back(-value);
    }
  }
  std::sort(all.begin(), all.end());
  std::copy(all.begin(), all.end(), values);
}

/// Cells of one sign: `values` are the magnitudes from 0 upwards, `midpoint_up` whether a midpoint
/// belongs to the larger of its two magnitudes.
void fill_cells(
    const std::vector<float>& values, bool midpoint_up, bool negative, int zero, uint32_t* cells) {
  size_t below = 0;  // values[below] is nearest where the cell begins
  for (uint32_t cell = 0; cell < kNumCells; ++cell) {
    const uint32_t first = (kFirstCell + cell) << 16;
    // bits of the largest magnitude that goes to the lower code of each pair
    const auto last_of = [&](size_t code) {
      if (code + 1 == values.size()) return 0xFFFFFFFFu;
      return bits_of((values[code] + values[code + 1]) / 2) - (midpoint_up ? 1 : 0);
    };
    while (last_of(below) < first) ++below;
    const uint32_t last = last_of(below);
    const uint32_t threshold = last > (first | 0xFFFFu) ? 0xFFFFu : last & 0xFFFFu;
    const int code = zero + (negative ? -static_cast<int>(below) : static_cast<int>(below));
    cells[cell] = static_cast<uint32_t>(code) << 16 | threshold;
  }
}

Map8 make_map(bool is_signed) {
  Map8 map{};
  fill_values(is_signed, map.values);
  const int zero = is_signed ? 127 : 0;
  std::vector<float> up(map.values + zero, map.values + 256), down;
  for (int i = zero; i >= 0; --i) down.push_back(-map.values[i]);
  // of x < 0 the lower code is the larger magnitude
  fill_cells(up, false, false, zero, map.cells);
  fill_cells(down, true, true, zero, map.cells + kNumCells);
  return map;
}

}  // namespace

const Map8& map8(bool is_signed) {
  static const Map8 with_sign = make_map(true), without = make_map(false);
  return is_signed ? with_sign : without;
}

void quantize8(std::span<const float> values,
               bool is_signed,
               std::span<uint8_t> codes,
               std::span<float> absmax) {
  if (codes.size() != values.size() || absmax.size() != (values.size() + kBlock8 - 1) / kBlock8)
    throw std::invalid_argument("quantize8: sizes of codes and absmax are not those of the values");
  const uint32_t* const cells = map8(is_signed).cells;
  for (size_t begin = 0; begin < values.size(); begin += kBlock8) {
    const auto block = values.subspan(begin, std::min<size_t>(kBlock8, values.size() - begin));
    float largest = 0;
    for (const float value : block) largest = std::max(largest, std::abs(value));
    absmax[begin / kBlock8] = largest;
    for (size_t i = 0; i < block.size(); ++i)
      codes[begin + i] = nearest8(largest > 0 ? block[i] / largest : 0.0f, cells);
  }
}

void dequantize8(std::span<const uint8_t> codes,
                 std::span<const float> absmax,
                 bool is_signed,
                 std::span<float> values) {
  if (codes.size() != values.size() || absmax.size() != (values.size() + kBlock8 - 1) / kBlock8)
    throw std::invalid_argument(
        "dequantize8: sizes of codes and absmax are not those of the values");
  const float* const map = map8(is_signed).values;
  for (size_t i = 0; i < codes.size(); ++i) values[i] = map[codes[i]] * absmax[i / kBlock8];
}

}  // namespace flux
