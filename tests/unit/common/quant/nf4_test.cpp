// NF4 against the arithmetic of bitsandbytes written with LibTorch's own operations; peers.quant
// compares with the library.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>

#include "common/quant/quant.h"
#include "common/quant/quant_cpu.h"
#include "tests/support/golden.h"

namespace flux {
namespace {

at::Tensor table() {
  std::vector<float> values;
  for (uint32_t code = 0; code < 16; ++code) values.push_back(kernel::nf4_value(code));
  return at::tensor(values);
}

/// Source: bitsandbytes 0.50.2, backends/default/ops.py, quantize_4bit. Codes [n], scales.
std::pair<at::Tensor, at::Tensor> reference(const at::Tensor& weight) {
  const auto values = weight.to(at::kFloat).flatten();
  const int64_t n = values.numel(), whole = n / 64 * 64;
  const auto blocks = values.narrow(0, 0, whole).view({-1, 64});
  auto largest = blocks.abs().amax(1);
  auto scaled =
      (blocks * largest.clamp_min(1e-38).reciprocal().unsqueeze(1)).clamp(-1, 1).flatten();
  if (whole < n) {
    const auto rest = values.narrow(0, whole, n - whole);
    const auto top = rest.abs().amax().clamp_min(1e-38);
    largest = at::cat({largest, top.unsqueeze(0)});
    scaled = at::cat({scaled, (rest / top).clamp(-1, 1)});
  }
  const auto t = table();
  return {at::bucketize(scaled, (t.slice(0, 0, 15) + t.slice(0, 1)) / 2), largest};
}

at::Tensor unpacked(const at::Tensor& codes) {
  const auto flat = codes.flatten().to(at::kLong);
  return at::stack({flat.bitwise_right_shift(4), flat.bitwise_and(15)}, 1).flatten();
}

TEST(Nf4, ItsTableIsSortedAndHasZero) {
  const auto t = table();
  EXPECT_TRUE((t.slice(0, 1) > t.slice(0, 0, 15)).all().item<bool>());
  EXPECT_EQ(t[7].item<float>(), 0.0f);
  EXPECT_EQ(t[0].item<float>(), -1.0f);
  EXPECT_EQ(t[15].item<float>(), 1.0f);
}

TEST(Nf4, TiesGoToTheLowerCode) {
  for (uint32_t code = 0; code < 15; ++code) {
    const float low = kernel::nf4_value(code), high = kernel::nf4_value(code + 1);
    const float middle = (low + high) / 2;
    EXPECT_EQ(kernel::nf4_code(low), code);
    EXPECT_EQ(kernel::nf4_code(middle), code);
    EXPECT_EQ(kernel::nf4_code(std::nextafter(middle, 2.0f)), code + 1);
    EXPECT_EQ(kernel::nf4_code(high), code + 1);
  }
}

TEST(Nf4, CodesAndScalesAreThoseOfBitsandbytes) {
  at::manual_seed(3);
  for (const auto& [out, in] : {std::pair<int64_t, int64_t>{48, 192}, {5, 150}, {3, 10}, {1, 64}})
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(testing::Message() << out << " x " << in << " " << type);
      auto x = (at::randn({out, in}) * 0.02).to(type);
      x[0][3] = 0;
      const auto weight = quantize(x, QuantFormat::kNf4);
      const auto [codes, scales] = reference(x);
      EXPECT_TRUE(at::equal(unpacked(weight.codes), codes));
      EXPECT_TRUE(at::equal(weight.scales, scales));
      const auto product =
          (table().index({codes}) * scales.repeat_interleave(64).narrow(0, 0, out * in))
              .view({out, in});
      EXPECT_TRUE(at::equal(dequantize(weight, at::kFloat), product));
      EXPECT_TRUE(at::equal(dequantize(weight, at::kBFloat16), product.to(at::kBFloat16)));
    }
}

TEST(Nf4, AnOddNumberOfValuesEndsWithTheCodeOfZero) {
  const std::vector<float> values{1, -1, 0.5f};
  uint8_t codes[2] = {};
  float scale = 0;
  const kernel::QuantBlocks blocks{1, 3, 64};
  kernel::nf4_quantize_cpu(blocks, 0, 1, values.data(), codes, &scale);
  EXPECT_EQ(codes[0], 0xF0);
  EXPECT_EQ(codes[1] & 15, 7);
  float back[3];
  kernel::nf4_dequantize_cpu(blocks, 0, 1, codes, &scale, back);
  EXPECT_EQ(back[1], -1.0f);
  EXPECT_EQ(back[2], kernel::nf4_value(codes[1] >> 4));
}

TEST(Nf4, ZeroStaysZero) {
  const auto weight = quantize(at::zeros({2, 64}), QuantFormat::kNf4);
  EXPECT_TRUE(at::equal(weight.codes, at::full({2, 32}, 0x77, at::kByte)));
  EXPECT_TRUE(at::equal(weight.scales, at::zeros({2})));
  EXPECT_TRUE(at::equal(dequantize(weight, at::kFloat), at::zeros({2, 64})));
}

TEST(Nf4, DoesNotDependOnTheNumberOfThreads) {
  at::manual_seed(4);
  const auto x = at::randn({300, 1000}).to(at::kBFloat16);
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = quantize(x, QuantFormat::kNf4);
  const auto back = dequantize(one, at::kBFloat16);
  at::set_num_threads(4);
  const auto four = quantize(x, QuantFormat::kNf4);
  EXPECT_TRUE(at::equal(one.codes, four.codes) && at::equal(one.scales, four.scales));
  EXPECT_TRUE(at::equal(back, dequantize(four, at::kBFloat16)));
  at::set_num_threads(before);
}

}  // namespace
}  // namespace flux
