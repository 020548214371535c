#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "common/quant/quant.h"
#include "common/quant/quant_cpu.h"
#include "tests/support/golden.h"

namespace flux {
namespace {

TEST(Fp8, ValuesAreThoseOfTheTable) {
  const auto table = test::golden("optim/fp8_e4m3.safetensors").at("table").clone();
  for (int code = 0; code < 256; ++code) {
    const float value = kernel::fp8_value(static_cast<uint8_t>(code));
    const auto wanted = table[code].item<float>();
    if (std::isnan(wanted))
      EXPECT_TRUE(std::isnan(value)) << code;
    else
      EXPECT_EQ(std::bit_cast<uint32_t>(value), std::bit_cast<uint32_t>(wanted)) << code;
  }
}

TEST(Fp8, CodesOfSingleValuesAreTorchs) {
  const auto golden = test::golden("optim/fp8_e4m3.safetensors");
  const auto x = golden.at("edge/x").clone(), codes = golden.at("edge/clamped_cast").clone();
  for (int64_t i = 0; i < x.numel(); ++i)
    EXPECT_EQ(kernel::fp8_code(x[i].item<float>()), codes[i].item<uint8_t>()) << x[i].item<float>();
}

TEST(Fp8, EveryCodeComesBackAndSoDoWhatLiesBetween) {
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7F) == 0x7F) continue;
    EXPECT_EQ(kernel::fp8_code(kernel::fp8_value(static_cast<uint8_t>(code))), code);
  }
  for (int code = 0; code < 0x7E;
       ++code) {  // ties go to the even code, what is beside them to its side
    const float low = kernel::fp8_value(static_cast<uint8_t>(code)),
                high = kernel::fp8_value(static_cast<uint8_t>(code + 1)), middle = (low + high) / 2;
    EXPECT_EQ(kernel::fp8_code(middle), code + code % 2) << code;
    EXPECT_EQ(kernel::fp8_code(std::nextafter(middle, 0.0f)), code) << code;
    EXPECT_EQ(kernel::fp8_code(std::nextafter(middle, 1e9f)), code + 1) << code;
    EXPECT_EQ(kernel::fp8_code(-middle), 0x80 + code + code % 2) << code;
  }
}

TEST(Fp8, AgreesWithLibTorchOnEveryBfloat16) {
  const auto bits = at::arange(0, 65536, at::kInt).to(at::kShort);
  const auto x = bits.view(at::kBFloat16).to(at::kFloat);
  const auto wanted =
      x.clamp(-448, 448).to(at::kFloat8_e4m3fn).view(at::kByte).to(at::kInt).contiguous();
  const auto* values = x.const_data_ptr<float>();
  const auto* codes = wanted.const_data_ptr<int>();
  for (int64_t i = 0; i < 65536; ++i) {
    if (std::isnan(values[i]))
      EXPECT_EQ(kernel::fp8_code(values[i]) & 0x7F, 0x7F);
    else
      ASSERT_EQ(kernel::fp8_code(values[i]), codes[i]) << values[i];
  }
}

// All three ways to scale are blocks: of a matrix, of a row, of 64.
TEST(Fp8, ScalesCodesAndValuesAreTheGoldenOnes) {
  const auto golden = test::golden("optim/fp8_e4m3.safetensors");
  for (const std::string name : {"w", "outlier", "zero_row"})
    for (const std::string kind : {"tensor", "channel", "block64"}) {
      SCOPED_TRACE(name + "/" + kind);
      const auto want = [&](const char* part) {
        return golden.at(name + "/" + kind + "/" + part).clone();
      };
      const auto x = golden.at(name + "/x").clone();
      const int64_t rows = x.size(0), in = x.size(1);
      const kernel::QuantBlocks blocks = kind == "tensor"
                                             ? kernel::QuantBlocks{1, rows * in, rows * in}
                                         : kind == "channel" ? kernel::QuantBlocks{rows, in, in}
                                                             : kernel::QuantBlocks{rows, in, 64};
      const auto codes = at::empty({rows, in}, at::kByte), scales = at::empty_like(want("scale")),
                 back = at::empty_like(x);
      ASSERT_EQ(blocks.count(), scales.numel());
      kernel::fp8_quantize_cpu(blocks,
                               0,
                               blocks.count(),
                               x.const_data_ptr<float>(),
                               codes.mutable_data_ptr<uint8_t>(),
                               scales.mutable_data_ptr<float>());
      kernel::fp8_dequantize_cpu(blocks,
                                 0,
                                 blocks.count(),
                                 codes.const_data_ptr<uint8_t>(),
                                 scales.const_data_ptr<float>(),
                                 back.mutable_data_ptr<float>());
      EXPECT_TRUE(at::equal(scales, want("scale")));
      EXPECT_TRUE(at::equal(codes, want("q")));
      EXPECT_TRUE(at::equal(back, want("deq")));
      if (kind == "block64") {
        const auto weight = quantize(x, QuantFormat::kFp8);
        EXPECT_TRUE(at::equal(weight.codes.view(at::kByte), want("q")));
        EXPECT_TRUE(at::equal(weight.scales, want("scale")));
        EXPECT_TRUE(at::equal(dequantize(weight, at::kFloat), want("deq")));
      }
    }
}

TEST(Fp8, WeightsInBfloat16RoundOnce) {
  at::manual_seed(1);
  const auto x = (at::randn({257, 200}) * 0.02).to(at::kBFloat16);  // short blocks too
  const auto weight = quantize(x, QuantFormat::kFp8);
  EXPECT_EQ(weight.out(), 257);
  EXPECT_EQ(weight.in(), 200);
  EXPECT_EQ(weight.scales.sizes(), at::IntArrayRef({257, 4}));
  const auto wide = quantize(x.to(at::kFloat), QuantFormat::kFp8);
  EXPECT_TRUE(at::equal(weight.codes.view(at::kByte), wide.codes.view(at::kByte)));
  EXPECT_TRUE(at::equal(weight.scales, wide.scales));
  const auto padded = weight.scales.repeat_interleave(64, 1).narrow(1, 0, 200);
  const auto product = weight.codes.to(at::kFloat) * padded;
  EXPECT_TRUE(at::equal(dequantize(weight, at::kFloat), product));
  EXPECT_TRUE(at::equal(dequantize(weight, at::kBFloat16), product.to(at::kBFloat16)));
  // 3 mantissa bits: within 1/16 of a value, or half a step of the smallest
  const auto error = (product - x.to(at::kFloat)).abs();
  EXPECT_TRUE((error <= x.to(at::kFloat).abs() / 16 + padded * 0x1p-10).all().item<bool>());
  EXPECT_TRUE(is_finite(weight));
}

TEST(Fp8, DoesNotDependOnTheNumberOfThreads) {
  at::manual_seed(2);
  const auto x = at::randn({300, 1000}).to(at::kBFloat16);
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = quantize(x, QuantFormat::kFp8);
  const auto back = dequantize(one, at::kBFloat16);
  at::set_num_threads(4);
  const auto four = quantize(x, QuantFormat::kFp8);
  EXPECT_TRUE(at::equal(one.codes.view(at::kByte), four.codes.view(at::kByte)));
  EXPECT_TRUE(at::equal(one.scales, four.scales));
  EXPECT_TRUE(at::equal(back, dequantize(four, at::kBFloat16)));
  at::set_num_threads(before);
}

TEST(Fp8, ANonFiniteWeightShowsInItsScale) {
  for (const float bad : {std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()})
    for (const QuantFormat format : {QuantFormat::kFp8, QuantFormat::kNf4}) {
      auto x = at::ones({4, 128});
      x[2][70] = bad;
      const auto weight = quantize(x, format);
      EXPECT_FALSE(is_finite(weight));
      EXPECT_EQ(weight.scales.isfinite().sum().item<int64_t>(), 7);
    }
}

TEST(Quantized, LayoutIsWhatIsAllocated) {
  for (const QuantFormat format : {QuantFormat::kFp8, QuantFormat::kNf4})
    for (const auto& [out, in] : {std::pair<int64_t, int64_t>{3, 64}, {5, 150}, {0, 64}}) {
      const auto layout = quantized_layout(format, out, in);
      const auto weight = quantize(at::ones({out, in}), format);
      EXPECT_EQ(weight.codes.nbytes(), layout.codes_bytes);
      EXPECT_EQ(weight.scales.nbytes(), layout.scales_bytes);
      EXPECT_EQ(weight.out(), out);
      EXPECT_EQ(weight.in(), in);
    }
  EXPECT_EQ(quantized_layout(QuantFormat::kFp8, 3072, 3072).bytes(), 3072 * 3072 / 16 * 17);
  EXPECT_EQ(quantized_layout(QuantFormat::kNf4, 3072, 3072).bytes(), 3072 * 3072 / 16 * 9);
}

TEST(Quantized, RefusesWhatDoesNotFit) {
  const auto x = at::ones({4, 128});
  const auto weight = quantize(x, QuantFormat::kFp8);
  EXPECT_THROW(quantize(x.to(at::kHalf), QuantFormat::kFp8), std::invalid_argument);
  EXPECT_THROW(quantize(x.t(), QuantFormat::kFp8), std::invalid_argument);
  EXPECT_THROW(quantize(x[0], QuantFormat::kFp8), std::invalid_argument);
  EXPECT_THROW(quantize(at::ones({4, 3}), QuantFormat::kNf4), std::invalid_argument);
  EXPECT_THROW(quantize_into(at::ones({4, 64}), weight), std::invalid_argument);
  EXPECT_THROW(dequantize_into(weight, at::empty({128, 4})), std::invalid_argument);
  EXPECT_THROW(dequantize_into({QuantFormat::kNf4, weight.codes, weight.scales}, x),
               std::invalid_argument);
}

}  // namespace
}  // namespace flux
