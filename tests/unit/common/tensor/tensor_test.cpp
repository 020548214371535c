#include "common/tensor/tensor.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/tensor/weight_file.h"
#include "tests/support/temporary_folder.h"

namespace flux {
namespace {

using test::TemporaryFolder;
using testing::HasSubstr;

TEST(Borrow, SharesAlignedMemoryAndKeepsItsOwner) {
  auto owner = std::make_shared<std::vector<float>>(std::vector<float>{1, 2, 3, 4, 5, 6});
  std::weak_ptr<std::vector<float>> watch = owner;
  at::Tensor tensor =
      borrow(std::as_bytes(std::span(*owner)), DType::kF32, std::array<int64_t, 2>{2, 3}, owner);
  EXPECT_EQ(tensor.const_data_ptr(), owner->data());
  owner.reset();
  EXPECT_EQ(tensor[1][2].item<float>(), 6.0f);
  tensor = at::Tensor();
  EXPECT_TRUE(watch.expired());
}

TEST(Borrow, CopiesUnalignedMemory) {
  alignas(8) const std::array<char, 9> raw{
      0, 0, 0, char(0x80), 0x3f, 0, 0, 0, 0};  // 1.0f at offset 1
  const at::Tensor tensor =
      borrow(std::as_bytes(std::span(raw)).subspan(1, 4), DType::kF32, {}, nullptr);
  EXPECT_EQ(tensor.item<float>(), 1.0f);
}

TEST(Borrow, RefusesSizesThatDisagree) {
  const std::array<std::byte, 8> raw{};
  const auto attempt = [&](std::vector<int64_t> shape, size_t bytes) {
    borrow(std::span(raw).first(bytes), DType::kF32, shape, nullptr);
  };
  EXPECT_NO_THROW(attempt({2}, 8));
  EXPECT_NO_THROW(attempt({0, 5}, 0));
  EXPECT_THROW(attempt({3}, 8), std::invalid_argument);
  EXPECT_THROW(attempt({-2, -1}, 8), std::invalid_argument);
  EXPECT_THROW(attempt({int64_t{1} << 62, 4}, 0), std::invalid_argument);  // wraps to 0
  EXPECT_THROW(attempt({0, int64_t{1} << 40, int64_t{1} << 40}, 0),
               std::invalid_argument);  // strides would wrap
  EXPECT_THROW(borrow(raw, DType::kF4, std::array<int64_t, 1>{16}, nullptr), std::invalid_argument);
}

TEST(DTypes, AreTheSameBothWays) {
  int known = 0;
  for (int i = 0; i <= static_cast<int>(DType::kF6E3M2); ++i) {
    const auto dtype = static_cast<DType>(i);
    if (const auto type = scalar_type(dtype)) {
      EXPECT_EQ(dtype_of(*type), dtype);
      EXPECT_EQ(static_cast<int64_t>(c10::elementSize(*type)) * 8, dtype_bits(dtype));
      ++known;
    }
  }
  EXPECT_EQ(known, 19);
  EXPECT_THROW(dtype_of(at::kComplexDouble), std::invalid_argument);
}

// 1 sign, 4 exponent (bias 7), 3 mantissa bits; subnormals m * 2^-9; 0x7F and 0xFF are NaN, there
// is no infinity
float e4m3fn(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float sign = code & 0x80 ? -1.0f : 1.0f;
  if (exponent == 15 && mantissa == 7) return NAN;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                               : std::ldexp(1.0f + static_cast<float>(mantissa) / 8, exponent - 7));
}

TEST(ToDtype, DecodesEveryFloat8Code) {
  std::array<uint8_t, 256> codes;
  std::iota(codes.begin(), codes.end(), uint8_t{0});
  const at::Tensor stored =
      borrow(std::as_bytes(std::span(codes)), DType::kF8E4M3, std::array<int64_t, 1>{256}, nullptr);
  EXPECT_EQ(stored.scalar_type(), at::kFloat8_e4m3fn);
  for (const auto type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor decoded = to_dtype(stored, type).to(at::kFloat);
    for (int code = 0; code < 256; ++code) {
      const float value = decoded[code].item<float>(), expected = e4m3fn(code);
      if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(value)) << code;
      } else {
        EXPECT_EQ(value, expected) << code;
        EXPECT_EQ(std::signbit(value), std::signbit(expected)) << code;
      }
    }
  }
}

TEST(CheckShape, NamesBothShapes) {
  const at::Tensor tensor = at::zeros({2, 3});
  EXPECT_NO_THROW(check_shape("x", tensor, {2, -1}));
  try {
    check_shape("x", tensor, {2, 3, 1});
    FAIL();
  } catch (const std::invalid_argument& e) {
    EXPECT_STREQ(e.what(), "x has shape [2, 3], expected [2, 3, 1]");
  }
}

TEST(WeightFile, ReadsWhatWasWritten) {
  TemporaryFolder folder;
  const auto path = folder / "w.safetensors";
  const TensorMap weights{{"a", at::arange(6, at::kFloat).view({2, 3}).t()},  // not contiguous
                          {"b", at::ones({4}).to(at::kFloat8_e4m3fn)},
                          {"c", at::full({}, 7, at::kLong)},
                          {"empty", at::empty({0, 2})}};
  write_weights(path, weights, {{"format", "pt"}});
  const WeightFile file = read_weights(path);
  ASSERT_EQ(file.tensors.size(), 4u);
  for (const auto& [name, tensor] : weights) {
    EXPECT_EQ(file.tensors.at(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(file.tensors.at(name).to(at::kFloat), tensor.to(at::kFloat))) << name;
  }
  EXPECT_EQ(file.metadata.at("format"), "pt");
  ASSERT_EQ(file.stamps.size(), 1u);
  EXPECT_EQ(file.stamps[0], file_stamp(path));
  std::filesystem::remove(path);  // the tensors keep the mapping
  EXPECT_EQ(file.tensors.at("a")[1][0].item<float>(), 1.0f);
}

TEST(WeightFile, RefusesTypesWithoutATensorType) {
  TemporaryFolder folder;
  const std::string json = R"({"w":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}   )";
  const auto path = folder.write(
      "w.safetensors",
      std::string(1, static_cast<char>(json.size())) + std::string(7, '\0') + json + "x");
  try {
    read_weights(path);
    FAIL();
  } catch (const InputError& e) {
    EXPECT_THAT(e.what(), HasSubstr("'w' has dtype F4"));
  }
}

}  // namespace
}  // namespace flux
