#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/core/error.h"
#include "common/quant/quant.h"

namespace flux {
namespace {

using testing::HasSubstr;

const std::string kName = "double_blocks.0.img_attn.qkv.weight";

template <class E>
std::string message_of(const auto& call) {
  try {
    call();
  } catch (const E& e) {
    return e.what();
  }
  return "nothing of that kind was thrown";
}

TEST(QuantizedNames, AreTheMatricesOfTheBlocks) {
  for (const char* name : {"double_blocks.0.img_attn.qkv.weight",
                           "double_blocks.18.txt_mod.lin.weight",
                           "single_blocks.37.linear2.weight",
                           "single_blocks.0.modulation.lin.weight"})
    EXPECT_TRUE(is_quantized_name(name)) << name;
  for (const char* name : {"double_blocks.0.img_attn.qkv.bias",
                           "double_blocks.0.img_attn.norm.query_norm.scale",
                           "img_in.weight",
                           "final_layer.linear.weight",
                           "time_in.in_layer.weight"})
    EXPECT_FALSE(is_quantized_name(name)) << name;
}

TEST(QuantizedNames, MetadataSaysTheFormat) {
  const std::string key(kQuantMetadataKey);
  EXPECT_EQ(stored_quant_format({{"format", "pt"}}, "f"), std::nullopt);
  EXPECT_EQ(stored_quant_format({{key, "fp8_e4m3_block64"}}, "f"), QuantFormat::kFp8);
  EXPECT_EQ(stored_quant_format({{key, "nf4_block64"}}, "f"), QuantFormat::kNf4);
  EXPECT_THAT(message_of<InputError>([&] {
                stored_quant_format({{key, "int8"}}, "f");
              }),
              HasSubstr("is 'int8', known are fp8_e4m3_block64 and nf4_block64"));
}

TEST(StoredWeight, IsFoundUnderItsNames) {
  for (const QuantFormat format : {QuantFormat::kFp8, QuantFormat::kNf4}) {
    const auto weight = quantize(at::randn({6, 128}), format);
    const TensorMap tensors{{kName, weight.codes}, {scale_name(kName), weight.scales}};
    const auto found = stored_weight(tensors, kName, format, "f");
    EXPECT_TRUE(found.codes.is_same(weight.codes));
    EXPECT_EQ(found.in(), 128);
    EXPECT_TRUE(at::equal(dequantize(found, at::kFloat), dequantize(weight, at::kFloat)));
    const auto other = format == QuantFormat::kFp8 ? QuantFormat::kNf4 : QuantFormat::kFp8;
    EXPECT_THROW(stored_weight(tensors, kName, other, "f"), InputError);
  }
}

TEST(StoredWeight, NamesWhatIsWrong) {
  const auto weight = quantize(at::randn({6, 128}), QuantFormat::kFp8);
  const auto message = [&](const at::Tensor& codes, const at::Tensor& scales) {
    TensorMap tensors;
    if (codes.defined()) tensors[kName] = codes;
    if (scales.defined()) tensors[scale_name(kName)] = scales;
    return message_of<InputError>([&] { stored_weight(tensors, kName, QuantFormat::kFp8, "f"); });
  };
  EXPECT_THAT(message({}, weight.scales), HasSubstr("tensor " + kName + " is missing"));
  EXPECT_THAT(message(weight.codes, {}), HasSubstr(kName + "_scale is missing"));
  EXPECT_THAT(message(weight.codes, weight.scales.narrow(1, 0, 1)),
              HasSubstr(kName + "_scale is F32 [6, 1], fp8_e4m3_block64 needs F32 [6, 2]"));
  EXPECT_THAT(message(weight.codes.view(at::kByte), weight.scales), HasSubstr("is U8 [6, 128]"));
  EXPECT_THAT(message(weight.codes.flatten(), weight.scales), HasSubstr("a matrix is needed"));
}

}  // namespace
}  // namespace flux
