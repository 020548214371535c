#include "pipelines/model/convert.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/engine/model_file.h"
#include "common/models/flux/load.h"
#include "common/models/flux/names.h"
#include "common/quant/quant.h"
#include "formats/safetensors/writer.h"
#include "pipelines/model/geometry.h"
#include "pipelines/model/info.h"
#include "tests/support/temporary_folder.h"

namespace flux::model {
namespace {

namespace fs = std::filesystem;
using test::TemporaryFolder;
using testing::HasSubstr;

constexpr QuantFormat kFormats[] = {QuantFormat::kFp8, QuantFormat::kNf4};

// hidden 96: rows that are no multiple of 64
const dit::Config kConfig{.pooled_dim = 32,
                          .prompt_dim = 48,
                          .hidden = 96,
                          .mlp = 384,
                          .num_heads = 3,
                          .num_double_blocks = 2,
                          .num_single_blocks = 2,
                          .axes = {4, 14, 14}};

fs::path random_model(const fs::path& path) {
  ShapeMap shapes;
  for (const auto& [name, shape] : dit::tensor_shapes(kConfig)) shapes.emplace(name, shape);
  write_random_net(path, "flux", 4, shapes, flux_scale, safetensors::pt_metadata());
  return path;
}

template <class E>
std::string message_of(const auto& call) {
  try {
    call();
  } catch (const E& e) {
    return e.what();
  }
  return "nothing of that kind was thrown";
}

TEST(Convert, WritesTheBitsThatQuantizeGives) {
  const TemporaryFolder folder;
  const auto in = random_model(folder / "in.safetensors");
  const auto plain = read_weights(in).tensors;
  for (const QuantFormat format : kFormats) {
    const auto out = folder / (std::string(quant_format_name(format)) + ".safetensors");
    const auto report = convert({in, out, format});
    EXPECT_EQ(report.bytes, static_cast<int64_t>(fs::file_size(out)));
    const auto file = read_weights(out);
    EXPECT_EQ(file.metadata.at("format"), "pt");
    EXPECT_EQ(stored_quant_format(file.metadata, out), format);
    int64_t quantized = 0;
    for (const auto& [name, tensor] : plain) {
      if (!is_quantized_name(name)) {
        EXPECT_TRUE(at::equal(file.tensors.at(name), tensor)) << name;
        continue;
      }
      ++quantized;
      const auto wanted = quantize(tensor, format);
      const auto found = stored_weight(file.tensors, name, format, out);
      EXPECT_TRUE(at::equal(found.codes.view(at::kByte), wanted.codes.view(at::kByte))) << name;
      EXPECT_TRUE(at::equal(found.scales, wanted.scales)) << name;
    }
    EXPECT_EQ(quantized, 2 * 10 + 2 * 3);
    EXPECT_EQ(report.quantized, quantized);
    EXPECT_EQ(file.tensors.size(), plain.size() + static_cast<size_t>(quantized));
    EXPECT_EQ(report.tensors + quantized, static_cast<int64_t>(plain.size()));
  }
}

// What training reads of the file is what it would have made of the plain one.
TEST(Convert, ReadsBackAsQuantisedOnTheFly) {
  const TemporaryFolder folder;
  const auto in = random_model(folder / "in.safetensors");
  for (const QuantFormat format : kFormats) {
    const auto out = folder / "q.safetensors";
    convert({in, out, format});
    const engine::ModelFile fly(in, {.quant = format}), stored(out);
    EXPECT_EQ(stored.quant(), format);
    EXPECT_EQ(stored.config(), kConfig);
    ASSERT_EQ(stored.num_records(), fly.num_records());
    for (int64_t i = 0; i < fly.num_records(); ++i) {
      ASSERT_EQ(stored.record_bytes(i), fly.record_bytes(i));
      std::vector<std::byte> a(static_cast<size_t>(fly.record_bytes(i))), b(a.size());
      fly.read(i, 0, a);
      stored.read(i, 0, b);
      EXPECT_EQ(a, b) << "record " << i;
    }
  }
}

TEST(Convert, TakesAnyLayoutAndWritesBflNames) {
  const TemporaryFolder folder;
  const auto in = random_model(folder / "in.safetensors");
  TensorMap diffusers = dit::to_diffusers(kConfig, read_weights(in).tensors);
  for (auto& [name, tensor] : diffusers) tensor = tensor.to(at::kFloat);
  write_weights(folder / "diffusers.safetensors", diffusers, {});
  convert({in, folder / "a.safetensors", QuantFormat::kFp8});
  convert({folder / "diffusers.safetensors", folder / "b.safetensors", QuantFormat::kFp8});
  EXPECT_EQ(read_file(folder / "b.safetensors"), read_file(folder / "a.safetensors"));
}

TEST(Convert, RefusesWhatItCannotQuantise) {
  const TemporaryFolder folder;
  const auto in = random_model(folder / "in.safetensors"), out = folder / "out.safetensors";
  auto tensors = read_weights(in).tensors;
  const std::string name = "single_blocks.1.linear2.weight";
  tensors[name] = tensors[name].clone();
  tensors[name][5][7] = std::numeric_limits<float>::quiet_NaN();
  write_weights(folder / "nan.safetensors", tensors, {});
  EXPECT_THAT(message_of<InputError>([&] {
                convert({folder / "nan.safetensors", out, QuantFormat::kNf4});
              }),
              HasSubstr("tensor " + name + " holds infinite values or NaN"));
  EXPECT_FALSE(fs::exists(out));
  EXPECT_THROW(convert({in, in, QuantFormat::kFp8}), UsageError);
  EXPECT_THROW(convert({in, folder.path(), QuantFormat::kFp8}), UsageError);
  folder.write("mine.safetensors", "somebody's");
  EXPECT_THAT(message_of<UsageError>([&] {
                convert({in, folder / "mine.safetensors", QuantFormat::kFp8});
              }),
              HasSubstr("no weights that flux-model convert made"));
  convert({in, out, QuantFormat::kFp8});
  EXPECT_THAT(message_of<InputError>([&] {
                convert({out, folder / "x.safetensors", QuantFormat::kFp8});
              }),
              HasSubstr("is quantised already"));
  EXPECT_NO_THROW(check(ConvertOptions{.in = "a", .out = "b"}));
  EXPECT_THROW(check(ConvertOptions{
                   .in = "a", .out = "b", .quantize = QuantFormat::kFp8, .dtype = DType::kBF16}),
               UsageError);
  EXPECT_THROW(check(ConvertOptions{.in = "a",
                                    .out = "b",
                                    .quantize = QuantFormat::kFp8,
                                    .layout = dit::ModelLayout::kDiffusers}),
               UsageError);
  EXPECT_THROW(check(ConvertOptions{.in = {}, .out = "b", .quantize = QuantFormat::kFp8}),
               UsageError);
  EXPECT_THROW(parse_quant_format("int8"), UsageError);
}

TEST(Convert, RefusesDtypesThatCannotHoldTheValues) {
  const TemporaryFolder folder;
  const auto in = random_model(folder / "in.safetensors"), out = folder / "out.safetensors";
  auto tensors = read_weights(in).tensors;
  const std::string name = "txt_in.weight";
  tensors[name] = tensors[name].clone();
  tensors[name][1][2] = 70000;
  const auto large = folder / "large.safetensors";
  write_weights(large, tensors, {});
  for (const DType dtype : {DType::kF16, DType::kF8E4M3}) {
    const auto message =
        message_of<InputError>([&] { convert({.in = large, .out = out, .dtype = dtype}); });
    EXPECT_THAT(message, HasSubstr("tensor " + name));
    EXPECT_THAT(message, HasSubstr("too large for"));
    EXPECT_FALSE(fs::exists(out));
  }
  convert({.in = large, .out = out, .dtype = DType::kF32});
  EXPECT_EQ(read_weights(out).tensors.at(name)[1][2].item<float>(),
            tensors[name][1][2].item<float>());
}

TEST(Convert, LayoutsAndShardsHaveTheSameBits) {
  const TemporaryFolder folder;
  const auto in = random_model(folder / "in.safetensors");
  const auto report = convert({.in = in,
                               .out = folder / "d",
                               .layout = dit::ModelLayout::kDiffusers,
                               .shard_bytes = 1 << 20});
  EXPECT_GT(report.files, 1u);
  const auto wanted = dit::to_diffusers(kConfig, read_weights(in).tensors),
             found = read_weights(folder / "d").tensors;
  ASSERT_EQ(found.size(), wanted.size());
  for (const auto& [name, tensor] : wanted) EXPECT_TRUE(at::equal(found.at(name), tensor)) << name;
  convert(
      {.in = folder / "d", .out = folder / "back.safetensors", .layout = dit::ModelLayout::kBfl});
  EXPECT_EQ(engine::ModelFile(folder / "back.safetensors").weights_sha256(),
            engine::ModelFile(in).weights_sha256());
}

TEST(Convert, QuantisedBecomesPlain) {
  const TemporaryFolder folder;
  const auto in = random_model(folder / "in.safetensors"), quantised = folder / "q.safetensors",
             out = folder / "plain.safetensors";
  for (const QuantFormat format : kFormats) {
    convert({in, quantised, format});
    convert({.in = quantised,
             .out = out,
             .layout = dit::ModelLayout::kDiffusers,
             .dtype = DType::kF32});
    const auto plain = dit::load_model(out, at::kFloat).canonical;
    const auto stored = read_weights(quantised).tensors;
    for (const auto& [name, tensor] : plain) {
      const auto expected =
          is_quantized_name(name)
              ? dequantize(stored_weight(stored, name, format, quantised), at::kFloat)
              : stored.at(name).to(at::kFloat);
      EXPECT_TRUE(at::equal(tensor, expected)) << name;
    }
    convert({.in = quantised, .out = folder / "again.safetensors"});
    EXPECT_EQ(engine::ModelFile(folder / "again.safetensors").weights_sha256(),
              engine::ModelFile(quantised).weights_sha256());
  }
}

TEST(Convert, LeavesNothingWhenItIsStopped) {
  const TemporaryFolder folder;
  const auto in = random_model(folder / "in.safetensors");
  cancel::set(ExitCode::kInterrupt);
  EXPECT_THROW(convert({in, folder / "out.safetensors", QuantFormat::kFp8}), Interrupted);
  cancel::set(std::nullopt);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), fs::directory_iterator()), 1);
}

TEST(Convert, ItsFilesAreDescribedAndOtherwiseRefusedByName) {
  const TemporaryFolder folder;
  setenv("XDG_CACHE_HOME", (folder / "cache").c_str(), 1);
  const auto in = random_model(folder / "in.safetensors"), out = folder / "q.safetensors";
  convert({in, out, QuantFormat::kNf4});
  InfoOptions options;
  options.files = {out};
  const auto net = info(options).nets.at(0);
  EXPECT_EQ(net["quantization"], "nf4_block64");
  EXPECT_EQ(net["parameters"], kConfig.num_parameters());
  EXPECT_EQ(net["dtypes"]["U8"], 26);
  EXPECT_THAT(info(options).text(), HasSubstr("quantization    nf4_block64"));
  EXPECT_THAT(message_of<InputError>([&] { dit::load_model(out, at::kFloat); }),
              HasSubstr("weights quantised by flux-model convert"));
}

}  // namespace
}  // namespace flux::model
