// linear() of a quantised weight against linear() of the same weight made plain.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "common/ops/linear.h"
#include "common/quant/scratch.h"

namespace flux {
namespace {

constexpr QuantFormat kFormats[] = {QuantFormat::kFp8, QuantFormat::kNf4};

struct Case {
  at::Tensor x, bias, down, up, w;
  QuantizedWeight quantized;
};

Case make(QuantFormat format, at::ScalarType type) {
  at::manual_seed(5);
  const auto leaf = [&](at::IntArrayRef shape, at::ScalarType of) {
    return at::randn(shape).to(of).requires_grad_();
  };
  return {leaf({2, 7, 192}, type),
          at::randn({80}).to(type),
          leaf({4, 192}, at::kFloat),
          leaf({80, 4}, at::kFloat),
          at::randn({2, 7, 80}).to(type),
          quantize(at::randn({80, 192}).to(type), format)};
}

std::vector<at::Tensor> run(const Case& c, const Linear& layer) {
  for (const auto& leaf : {c.x, c.down, c.up}) leaf.mutable_grad() = at::Tensor();
  const auto y = linear(layer, c.x);
  (y * c.w).sum().backward();
  std::vector<at::Tensor> out{y.detach(), c.x.grad()};
  if (layer.lora.down.defined()) {
    out.push_back(c.down.grad());
    out.push_back(c.up.grad());
  }
  return out;
}

TEST(QuantizedLinear, HasTheBitsOfThePlainWeight) {
  for (const QuantFormat format : kFormats)
    for (const auto type : {at::kFloat, at::kBFloat16})
      for (const bool adapter : {false, true})
        for (const bool bias : {false, true}) {
          SCOPED_TRACE(testing::Message() << quant_format_name(format) << " " << type << " adapter "
                                          << adapter << " bias " << bias);
          const Case c = make(format, type);
          const LowRank lora = adapter ? LowRank{c.down, c.up, 0.75} : LowRank{};
          const at::Tensor b = bias ? c.bias : at::Tensor();
          const auto wanted = run(c, {dequantize(c.quantized, type), b, lora});
          const auto got = run(c, {{}, b, lora, c.quantized});
          ASSERT_EQ(wanted.size(), got.size());
          for (size_t i = 0; i < wanted.size(); ++i) {
            ASSERT_TRUE(got[i].defined());
            EXPECT_TRUE(at::equal(got[i], wanted[i])) << "result " << i;
          }
        }
}

TEST(QuantizedLinear, KeepsCodesAndScalesForBackwardAndNoPlainWeight) {
  for (const QuantFormat format : kFormats) {
    const Case c = make(format, at::kBFloat16);
    release_plain_weights(at::kCPU);
    const auto before = c.quantized.codes.use_count();
    const auto y = linear({{}, c.bias, {}, c.quantized}, c.x);
    EXPECT_EQ(c.quantized.codes.use_count(), before + 1);  // the node's
    // the weight lay in the scratch, and only there
    EXPECT_EQ(reserved_plain_weights(at::kCPU), plain_weight_bytes(80, 192, at::kBFloat16));
    EXPECT_EQ(reserved_plain_weights(at::kCPU), 80 * 192 * 2);
    // what another weight left in the scratch does no harm
    linear({{}, {}, {}, quantize(at::full({80, 192}, 7.0f), format)}, at::ones({1, 192}));
    c.x.mutable_grad() = at::Tensor();
    (y * c.w).sum().backward();
    const auto grad = c.x.grad().clone();
    run(c, {dequantize(c.quantized, at::kBFloat16), c.bias, {}});
    EXPECT_TRUE(at::equal(grad, c.x.grad()));
  }
}

TEST(QuantizedLinear, WithoutAnAdapterKeepsNoInput) {
  const Case c = make(QuantFormat::kFp8, at::kBFloat16);
  const auto x = c.x * 1;  // no leaf: only a node can hold it
  const auto before = x.use_count();
  const auto y = linear({{}, c.bias, {}, c.quantized}, x);
  EXPECT_EQ(x.use_count(), before);
  const auto z = linear({{}, c.bias, {c.down, c.up, 1}, c.quantized}, x);
  EXPECT_TRUE(y.requires_grad() && z.requires_grad());
}

TEST(QuantizedLinear, ScratchIsThatOfTheLargestWeight) {
  release_plain_weights(at::kCPU);
  EXPECT_EQ(reserved_plain_weights(at::kCPU), 0);
  reserve_plain_weights(at::kCPU, 5000);
  const auto x = at::ones({1, 64});
  linear({{}, {}, {}, quantize(at::ones({8, 64}), QuantFormat::kFp8)}, x);
  EXPECT_EQ(reserved_plain_weights(at::kCPU), 5000);  // 2048 fit
  linear({{}, {}, {}, quantize(at::ones({32, 64}), QuantFormat::kFp8)}, x);
  EXPECT_EQ(reserved_plain_weights(at::kCPU), 32 * 64 * 4);
  release_plain_weights(at::kCPU);
}

TEST(QuantizedLinear, HasAShapeOnMeta) {
  for (const QuantFormat format : kFormats) {
    const auto meta = at::Device(at::kMeta);
    const auto x = at::empty({2, 7, 192}, at::device(meta).dtype(at::kBFloat16)).requires_grad_();
    const auto y = linear({{}, {}, {}, empty_quantized(format, 80, 192, meta)}, x);
    EXPECT_TRUE(y.is_meta());
    EXPECT_EQ(y.sizes(), at::IntArrayRef({2, 7, 80}));
    y.backward(at::empty_like(y));
    EXPECT_EQ(x.grad().sizes(), x.sizes());
    EXPECT_EQ(reserved_plain_weights(meta), 80 * 192 * 2);
    release_plain_weights(meta);
  }
}

TEST(QuantizedLinear, NamesWhatDoesNotFit) {
  const Case c = make(QuantFormat::kNf4, at::kFloat);
  const auto plain = dequantize(c.quantized, at::kFloat);
  EXPECT_THROW(linear({plain, {}, {}, c.quantized}, c.x), std::invalid_argument);
  EXPECT_THROW(linear(Linear(), c.x), std::invalid_argument);
  EXPECT_THROW(linear({{}, {}, {}, c.quantized}, at::ones({3, 96})), std::invalid_argument);
  EXPECT_THROW(linear({{}, {}, {}, c.quantized}, c.x.to(at::kHalf)), std::invalid_argument);
  EXPECT_THROW(linear({{}, at::ones({81}), {}, c.quantized}, c.x), std::invalid_argument);
  QuantizedWeight broken = c.quantized;
  broken.scales = broken.scales.narrow(0, 1, 200);
  EXPECT_THROW(linear({{}, {}, {}, broken}, c.x), std::invalid_argument);
}

}  // namespace
}  // namespace flux
