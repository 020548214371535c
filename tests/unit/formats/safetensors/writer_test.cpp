#include "formats/safetensors/writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>

#include "common/core/hash.h"
#include "common/core/rng.h"
#include "tests/support/temporary_folder.h"

namespace flux::safetensors {
namespace {

using test::TemporaryFolder;
using testing::HasSubstr;

std::vector<std::byte> random_bytes(const RandomStream& random, uint64_t first, size_t count) {
  std::vector<std::byte> bytes(count);
  for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::byte>(random.bits(first + i));
  return bytes;
}

TEST(SafetensorsWriter, WhatItWritesReadsBackEqual) {  // property
  constexpr DType kTypes[] = {DType::kBool,
                              DType::kF64,
                              DType::kBF16,
                              DType::kF8E4M3,
                              DType::kI64,
                              DType::kF32,
                              DType::kF4};
  TemporaryFolder folder;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const RandomStream random(seed, Purpose::kDemo);
    std::vector<TensorSpec> specs;
    std::map<std::string, std::vector<std::byte>> values;
    const uint64_t count = random.below(0, 20);
    for (uint64_t t = 0; t < count; ++t) {
      TensorSpec spec{"t\"\n/../é" + std::to_string(t),
                      kTypes[random.below(10 * t + 1, std::size(kTypes))],
                      {}};
      for (uint64_t d = 0; d < random.below(10 * t + 2, 4); ++d)
        spec.shape.push_back(static_cast<int64_t>(random.below(10 * t + 3 + d, 4)));
      if (spec.dtype == DType::kF4) spec.shape.push_back(2);
      values[spec.name] = random_bytes(random, 1000 * t, tensor_bytes(spec.dtype, spec.shape));
      specs.push_back(spec);
    }
    const auto path = folder / "f.safetensors";
    Writer writer(path, specs, {{"format", "pt"}, {"note", "a\nb\"é"}});
    for (const TensorSpec& spec : writer.order()) {  // in pieces of at most 5 bytes
      const std::span<const std::byte> bytes = values[spec.name];
      for (size_t at = 0; at < bytes.size(); at += 5)
        writer.write(spec.name, bytes.subspan(at, std::min<size_t>(5, bytes.size() - at)));
    }
    writer.commit();

    const auto file = File::open(path);
    ASSERT_EQ(file->tensors().size(), specs.size());
    EXPECT_EQ(file->metadata().at("note"), "a\nb\"é");
    for (const TensorSpec& spec : specs) {
      const Tensor* tensor = file->find(spec.name);
      ASSERT_NE(tensor, nullptr);
      EXPECT_EQ(tensor->dtype, spec.dtype);
      EXPECT_EQ(tensor->shape, spec.shape);
      EXPECT_TRUE(std::equal(tensor->bytes.begin(),
                             tensor->bytes.end(),
                             values[spec.name].begin(),
                             values[spec.name].end()));
      if (dtype_bits(tensor->dtype) >= 8 && !tensor->bytes.empty()) {
        EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor->bytes.data()) %
                      static_cast<uintptr_t>(dtype_bits(tensor->dtype) / 8),
                  0u);
      }
    }
  }
}

TEST(SafetensorsWriter, OrdersByElementSizeThenName) {
  TemporaryFolder folder;
  Writer writer(folder / "f",
                {{"b", DType::kBF16, {1}}, {"z", DType::kF32, {1}}, {"a", DType::kBF16, {1}}},
                pt_metadata());
  std::string names;
  for (const TensorSpec& spec : writer.order()) names += spec.name;
  EXPECT_EQ(names, "zab");
}

TEST(SafetensorsWriter, PadsTheHeaderToEightBytes) {  // byte for byte, by the format's description
  TemporaryFolder folder;
  Writer writer(folder / "f", {{"w", DType::kU8, {2}}}, {});
  writer.write("w", as_bytes(std::string_view("ab")));
  writer.commit();
  const std::string json = R"({"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})";
  EXPECT_EQ(
      read_file(folder / "f"),
      std::string("\x38\0\0\0\0\0\0\0", 8) + json + std::string(56 - json.size(), ' ') + "ab");
}

TEST(SafetensorsWriter, LeavesNothingBehindWithoutCommit) {
  TemporaryFolder folder;
  {
    Writer writer(folder / "f", {{"w", DType::kU8, {2}}}, {});
    writer.write("w", as_bytes(std::string_view("a")));
    EXPECT_THROW(writer.commit(), std::invalid_argument);
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(SafetensorsWriter, RefusesWhatTheReaderWouldRefuse) {
  TemporaryFolder folder;
  const auto write = [&](std::vector<TensorSpec> specs, Metadata metadata = {}) {
    Writer(folder / "f", std::move(specs), metadata);
  };
  EXPECT_THROW(write({{"a", DType::kU8, {1}}, {"a", DType::kF32, {1}}}), std::invalid_argument);
  EXPECT_THROW(write({{"__metadata__", DType::kU8, {1}}}), std::invalid_argument);
  EXPECT_THROW(write({{"\xff", DType::kU8, {1}}}), std::invalid_argument);
  EXPECT_THROW(write({{"a", DType::kU8, {-1}}}), std::invalid_argument);
  EXPECT_THROW(write({{"a", DType::kF4, {3}}}), std::invalid_argument);
  EXPECT_THROW(write({{"a", DType::kU8, {int64_t{1} << 62, 8}}}), std::invalid_argument);
  EXPECT_THROW(write({}, {{"k", "\xff"}}), std::invalid_argument);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(SafetensorsWriter, RefusesBytesOutOfTurn) {
  TemporaryFolder folder;
  Writer writer(folder / "f", {{"a", DType::kU8, {1}}, {"b", DType::kU8, {1}}}, {});
  EXPECT_THROW(writer.write("b", as_bytes(std::string_view("x"))), std::invalid_argument);
  EXPECT_THROW(writer.write("a", as_bytes(std::string_view("xy"))), std::invalid_argument);
}

}  // namespace
}  // namespace flux::safetensors
