#include "formats/safetensors/writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>

#include "common/core/error.h"
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

/// Two tensors of bytes "abcd" and "xyz", in the order of a file: "long" and "short".
const std::vector<TensorSpec> kTwo{{"short", DType::kU8, {3}}, {"long", DType::kU8, {4}}};

std::span<const std::byte> text(std::string_view bytes) { return as_bytes(bytes); }

TEST(SafetensorsScattered, PartsInAnyOrderMakeTheFileOfWriter) {
  TemporaryFolder folder;
  Writer whole(folder / "whole", kTwo, pt_metadata());
  whole.write("long", text("abcd"));
  whole.write("short", text("xyz"));
  whole.commit();
  ScatteredWriter parts(folder / "parts", kTwo, pt_metadata());
  parts.write_part("short", 2, text("z"));
  parts.write_part("long", 1, text("bc"));
  parts.write_part("short", 0, text("xy"));
  parts.write_part("long", 3, text("d"));
  parts.write_part("long", 0, text("a"));
  parts.commit();
  EXPECT_EQ(read_file(folder / "parts"), read_file(folder / "whole"));
}

template <typename Work>
std::string refusal(const Work& work) {
  try {
    work();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was refused";
}

TEST(SafetensorsScattered, KnowsOfEachByteThatItIsWrittenOnce) {
  TemporaryFolder folder;
  ScatteredWriter writer(folder / "f", kTwo, Metadata{});
  writer.write_part("long", 0, text("ab"));
  EXPECT_THAT(refusal([&] { writer.write_part("long", 1, text("bc")); }),
              HasSubstr("'long' is written twice"));
  EXPECT_THAT(refusal([&] { writer.write_part("long", 0, text("a")); }),
              HasSubstr("'long' is written twice"));
  EXPECT_THAT(refusal([&] { writer.write_part("long", 3, text("de")); }),
              HasSubstr("'long' has 4 bytes, 2 were given from 3 on"));
  EXPECT_THAT(refusal([&] { writer.write_part("long", 5, {}); }), HasSubstr("'long' has 4 bytes"));
  EXPECT_THAT(refusal([&] { writer.write("short", text("xy")); }),
              HasSubstr("'short' has 3 bytes, 2 were given"));
  EXPECT_THAT(refusal([&] { writer.write("other", text("xy")); }), HasSubstr("'other'"));
  writer.write("short", text("xyz"));
  writer.write_part("long", 3, text("d"));
  EXPECT_THAT(refusal([&] { writer.write_part("long", 2, text("cd")); }),
              HasSubstr("'long' is written twice"));
  EXPECT_THAT(refusal([&] { writer.commit(); }),
              HasSubstr("f: 6 bytes of 7 were written, tensor 'long' is not whole"));
  writer.write_part("long", 2, text("c"));
  writer.commit();
  EXPECT_THAT(read_file(folder / "f"), testing::EndsWith("abcdxyz"));
}

TEST(SafetensorsScattered, ATensorOfNoBytesNeedsNoWrite) {
  TemporaryFolder folder;
  ScatteredWriter writer(folder / "f", {{"none", DType::kF32, {0, 4}}}, Metadata{});
  writer.write("none", {});
  writer.commit();
  EXPECT_EQ(File::open(folder / "f")->tensors().size(), 1u);
}

TEST(SafetensorsScattered, SeveralProcessesWriteOneFile) {
  TemporaryFolder folder;
  const auto path = folder / "f";
  ScatteredWriter first(path, kTwo, Metadata{{"only", "the first knows its metadata"}});
  const ScatteredWriter::Shared shared = first.share();
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_EQ(std::filesystem::file_size(folder / shared.temporary), shared.data_begin + 7);
  std::vector<ScatteredWriter::Range> written;
  {
    ScatteredWriter second(path, kTwo, shared);
    second.write_part("long", 1, text("bcd"));
    second.write_part("short", 0, text("xy"));
    written = second.leave();
  }
  EXPECT_TRUE(std::filesystem::exists(folder / shared.temporary)) << "it is the first one's";
  ASSERT_EQ(written.size(), 1u);  // one behind the other
  EXPECT_EQ(written[0].begin, 1u);
  EXPECT_EQ(written[0].end, 6u);
  first.write_part("long", 0, text("a"));
  EXPECT_THAT(refusal([&] { first.commit(); }),
              HasSubstr("f: 1 bytes of 7 were written, tensor 'long' is not whole"));
  first.add_written(written);
  EXPECT_THAT(refusal([&] { first.add_written(written); }), HasSubstr("'long' is written twice"));
  EXPECT_THAT(refusal([&] { first.commit(); }),
              HasSubstr("f: 6 bytes of 7 were written, tensor 'short' is not whole"));
  first.write_part("short", 2, text("z"));
  first.commit();
  EXPECT_THAT(read_file(path), testing::EndsWith("abcdxyz"));
  EXPECT_EQ(File::open(path)->metadata().count("only"), 1u);
}

TEST(SafetensorsScattered, AFileThatIsNotThereIsNotJoined) {
  TemporaryFolder folder;
  EXPECT_THROW(ScatteredWriter(folder / "f", kTwo, ScatteredWriter::Shared{".f.tmp-0", 8}),
               ResourceError);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

}  // namespace
}  // namespace flux::safetensors
