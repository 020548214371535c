#include "common/optim/blockwise8.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "common/core/rng.h"
#include "common/optim/tile_simd.h"
#include "tests/support/golden.h"

namespace flux {
namespace {

/// By the rule itself: the first code whose upper midpoint is not below x.
uint8_t nearest_by_search(float x, bool is_signed) {
  const float* const map = map8(is_signed).values;
  int code = 0;
  while (code < 255 && (map[code] + map[code + 1]) / 2 < x) ++code;
  return static_cast<uint8_t>(code);
}

TEST(Blockwise8, MapsAreThoseOfTheReference) {
  const TensorMap golden = test::golden("optim/blockwise8.safetensors");
  for (const bool is_signed : {true, false}) {
    const at::Tensor& wanted = golden.at(is_signed ? "signed" : "unsigned");
    const float* const values = map8(is_signed).values;
    EXPECT_TRUE(std::equal(values, values + 256, wanted.const_data_ptr<float>())) << is_signed;
  }
}

TEST(Blockwise8, FindsTheNearestCodeOfEveryMidpointAndItsNeighbours) {
  for (const bool is_signed : {true, false}) {
    const Map8& map = map8(is_signed);
    for (int code = 0; code < 255; ++code) {
      const float midpoint = (map.values[code] + map.values[code + 1]) / 2;
      for (const float x :
           {std::nextafter(midpoint, -2.0f), midpoint, std::nextafter(midpoint, 2.0f)})
        ASSERT_EQ(nearest8(x, map.cells), nearest_by_search(x, is_signed)) << x;
      ASSERT_EQ(nearest8(map.values[code], map.cells), code);
    }
    ASSERT_EQ(nearest8(1.0f, map.cells), 255);
  }
}

TEST(Blockwise8, FindsTheNearestCodeOfAnyValue) {
  std::mt19937 engine(3);
  std::uniform_real_distribution<float> exponent(-30, 0);
  for (int i = 0; i < 200'000; ++i) {
    const float magnitude = std::exp2(exponent(engine)), x = i % 2 == 0 ? magnitude : -magnitude;
    ASSERT_EQ(nearest8(x, map8(true).cells), nearest_by_search(x, true)) << x;
    ASSERT_EQ(nearest8(magnitude, map8(false).cells), nearest_by_search(magnitude, false)) << x;
  }
  for (const float x : {0.0f, -0.0f, 1e-45f, -1e-45f, 1e-38f})
    EXPECT_EQ(nearest8(x, map8(true).cells), 127) << x;
}

TEST(Blockwise8, ReadsNoMemoryBeyondItsTableForAnyBits) {
  std::vector<uint32_t> cells(2 * kNumCells, 0x007F'FFFF);
  std::mt19937 engine(4);
  for (int i = 0; i < 100'000; ++i) EXPECT_LE(nearest8(float_of(static_cast<uint32_t>(engine())), cells.data()), 0x80);
  for (const uint32_t bits : {0x7F80'0000u, 0xFF80'0000u, 0x7FFF'FFFFu, 0xFFFF'FFFFu})
    EXPECT_LE(nearest8(float_of(bits), cells.data()), 0x80);
}

TEST(Blockwise8, RefusesSizesThatDisagree) {
  std::vector<float> values(300), absmax(1);
  std::vector<uint8_t> codes(300);
  EXPECT_THROW(quantize8(values, true, codes, absmax), std::invalid_argument);
  EXPECT_THROW(dequantize8(codes, absmax, true, values), std::invalid_argument);
}

TEST(TileFunctions, GiveTheSameBitsWithAnyInstructions) {
  std::mt19937 engine(5);
  std::normal_distribution<float> normal;
  for (const int64_t n : {1, 7, 8, 16, 23, 255, 256}) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = normal(engine) * std::exp2(-normal(engine) * 5);
    float absmax = 0;
    for (const float value : values) absmax = std::max(absmax, std::abs(value));
    const TileFunctions& plain = tile_functions(0);
    for (const bool is_signed : {true, false}) {
      if (!is_signed)
        for (float& value : values) value = std::abs(value);
      const Map8& map = map8(is_signed);
      std::vector<uint8_t> wanted(values.size()), codes(values.size());
      std::vector<float> wanted_values(values.size()), decoded(values.size());
      plain.encode8(values.data(), absmax, map.cells, n, wanted.data());
      plain.decode8(wanted.data(), absmax, map.values, n, wanted_values.data());
      for (int i = 1; i < num_tile_functions(); ++i) {
        tile_functions(i).encode8(values.data(), absmax, map.cells, n, codes.data());
        EXPECT_EQ(codes, wanted) << tile_functions(i).name;
        tile_functions(i).decode8(codes.data(), absmax, map.values, n, decoded.data());
        EXPECT_EQ(decoded, wanted_values) << tile_functions(i).name;
      }
    }
  }
}

TEST(TileFunctions, DrawTheProjectsPhilox) {
  const RoundingKey key{{0x1234'5678, 0x9ABC'DEF0}, {7, 0xFFFF'FFFF}};
  for (const uint64_t first : {uint64_t{0}, uint64_t{12'345 * 128}, (uint64_t{5} << 32) + 128}) {
    for (const int64_t blocks : {1, 3, 4, 8, 13, 128}) {
      std::vector<uint16_t> wanted;
      for (uint64_t b = first; b < first + static_cast<uint64_t>(blocks); ++b) {
        for (const uint32_t word : philox4x32({static_cast<uint32_t>(b),
                                               static_cast<uint32_t>(b >> 32),
                                               key.high[0],
                                               key.high[1]},
                                              {key.key[0], key.key[1]})) {
          wanted.push_back(static_cast<uint16_t>(word));
          wanted.push_back(static_cast<uint16_t>(word >> 16));
        }
      }
      for (int i = 0; i < num_tile_functions(); ++i) {
        std::vector<uint16_t> got(wanted.size());
        tile_functions(i).random(key, first, blocks, got.data());
        EXPECT_EQ(got, wanted) << tile_functions(i).name << " from " << first;
      }
    }
  }
}

}  // namespace
}  // namespace flux
