#include "common/engine/model_file.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>

#include "common/core/error.h"
#include "common/engine/ring.h"
#include "common/models/flux/load.h"
#include "common/models/flux/names.h"
#include "common/models/weights/weights.h"
#include "common/tensor/tensor.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/tiny_flux.h"

namespace flux::engine {
namespace {

using testing::AllOf;
using testing::HasSubstr;
namespace fs = std::filesystem;

/// Two and two blocks of odd sizes: matrices whose rows are no multiple of 64.
dit::Config odd_config() {
  dit::Config config = test::tiny_flux_config();
  config.hidden = 96;
  config.num_heads = 3;
  config.axes = {4, 14, 14};
  config.mlp = 160;
  config.num_double_blocks = 2;
  config.num_single_blocks = 2;
  return config;
}
/// With matrices that are read in several pieces.
dit::Config wide_config() {
  dit::Config config = test::tiny_flux_config(false);
  config.hidden = 384;
  config.num_heads = 3;
  config.mlp = 1536;
  return config;
}

TensorMap with_dtype(TensorMap tensors, at::ScalarType dtype) {
  for (auto& [name, tensor] : tensors) tensor = to_dtype(tensor, dtype);
  return tensors;
}

/// Norm scales in float32, as some published files have them.
TensorMap with_float_scales(TensorMap tensors) {
  for (auto& [name, tensor] : tensors)
    if (name.find("norm") != std::string::npos) tensor = tensor.to(at::kFloat);
  return tensors;
}

fs::path write_shards(const fs::path& folder, const TensorMap& tensors) {
  std::array<TensorMap, 3> shards;
  size_t next = 0;
  nlohmann::json index;
  for (const auto& [name, tensor] : tensors) {
    const size_t shard = next++ % shards.size();
    shards[shard][name] = tensor;
    index["weight_map"][name] = "m-0000" + std::to_string(shard + 1) + "-of-00003.safetensors";
  }
  fs::create_directories(folder);
  for (size_t i = 0; i < shards.size(); ++i)
    write_weights(
        folder / ("m-0000" + std::to_string(i + 1) + "-of-00003.safetensors"), shards[i], {});
  std::ofstream(folder / "m.safetensors.index.json") << index.dump();
  return folder;
}

fs::path write_all_in_one(const fs::path& file, const TensorMap& tensors) {
  TensorMap all{{"vae.encoder.down.0.block.0.norm1.weight", at::zeros({4})}};
  for (const auto& [name, tensor] : tensors) all["model.diffusion_model." + name] = tensor;
  write_weights(file, all, {});
  return file;
}

/// The same file with a header one byte longer, so that no tensor is aligned.
fs::path write_unaligned(const fs::path& file, const TensorMap& tensors) {
  write_weights(file, tensors, {});
  std::ifstream in(file, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  bytes.insert(8 + header, " ");
  ++header;
  std::memcpy(bytes.data(), &header, 8);
  std::ofstream(file, std::ios::binary) << bytes;
  return file;
}

TensorMap canonical_of(const fs::path& path) {
  const auto net = take_net(read_weights(path), NetKind::kFlux);
  return dit::canonical_tensors(net, dit::read_config(net));
}

/// The record as this program's other loaders would make it.
at::Tensor expected_record(const dit::Config& config,
                           int64_t index,
                           const TensorMap& tensors,
                           at::ScalarType dtype,
                           std::optional<QuantFormat> quant) {
  const auto layout = block_layout(config, index, dtype, quant);
  const auto record = at::zeros({layout.bytes()}, at::kByte);
  const auto prefix = block_prefix(config, index);
  for (const Slice& slice : layout.slices()) {
    if (slice.name.ends_with("_scale")) continue;
    const auto& tensor = tensors.at(prefix + slice.name);
    const auto bytes_of = [](const at::Tensor& t) { return t.contiguous().view(at::kByte); };
    if (quant && is_quantized_name(prefix + slice.name)) {
      const auto weight = quantize(to_dtype(tensor, at::kBFloat16).contiguous(), *quant);
      layout.view(record, slice.name).view(at::kByte).copy_(bytes_of(weight.codes));
      layout.view(record, scale_name(slice.name)).copy_(weight.scales);
    } else {
      layout.view(record, slice.name).view(at::kByte).copy_(bytes_of(to_dtype(tensor, dtype)));
    }
  }
  return record;
}

void expect_reads(const ModelFile& file, int64_t index, const at::Tensor& expected) {
  const auto bytes = static_cast<size_t>(file.record_bytes(index));
  ASSERT_EQ(bytes, expected.nbytes());
  const auto* want = static_cast<const std::byte*>(expected.const_data_ptr());
  std::vector<std::byte> got(bytes, std::byte{0xEE});
  file.read(index, got);
  for (const Slice& slice : file.layout(index).slices())
    ASSERT_EQ(std::memcmp(
                  got.data() + slice.offset, want + slice.offset, static_cast<size_t>(slice.bytes)),
              0)
        << slice.name;
  ASSERT_EQ(std::memcmp(got.data(), want, bytes), 0) << "between slices";
  // any part is the same
  std::mt19937_64 random(static_cast<uint64_t>(index));
  for (int round = 0; round < 12; ++round) {
    const auto units = static_cast<int64_t>(bytes) / kSliceAlignment;
    const auto first = std::uniform_int_distribution<int64_t>(0, units)(random);
    const auto most = round % 2 == 0 ? std::min<int64_t>(units - first, 40) : units - first;
    const auto count = std::uniform_int_distribution<int64_t>(0, most)(random);
    const auto part_bytes = static_cast<size_t>(count * kSliceAlignment);
    std::vector<std::byte> part(part_bytes + 1, std::byte{0xEE});
    file.read(index, first * kSliceAlignment, {part.data(), part_bytes});
    ASSERT_EQ(std::memcmp(part.data(), want + first * kSliceAlignment, part_bytes), 0)
        << part_bytes << " bytes at " << first * kSliceAlignment;
    ASSERT_EQ(part.back(), std::byte{0xEE});
  }
}

void expect_matches(const fs::path& path, const ModelFileOptions& options) {
  const ModelFile file(path, options);
  const auto tensors = canonical_of(path);
  ASSERT_EQ(file.num_records(), file.config().num_double_blocks + file.config().num_single_blocks);
  for (int64_t i = 0; i < file.num_records(); ++i) {
    SCOPED_TRACE(testing::Message() << "record " << i);
    file.prefetch(i);
    expect_reads(file, i, expected_record(file.config(), i, tensors, options.dtype, options.quant));
    int64_t end = 0;
    for (const auto& [offset, bytes] : file.parts(i, 65536)) {
      EXPECT_EQ(offset, end);
      end += bytes;
    }
    EXPECT_EQ(end, file.record_bytes(i));
  }
  for (const auto& [name, tensor] : tensors) {
    if (name.find("_blocks.") != std::string::npos) continue;
    auto to = at::empty(tensor.sizes(), options.dtype);
    file.read_tensor(name, to);
    const auto want = to_dtype(tensor, options.dtype).contiguous();
    EXPECT_EQ(std::memcmp(to.data_ptr(), want.data_ptr(), to.nbytes()), 0) << name;
  }
}

TEST(ModelFile, GivesTheBitsOfTheWholeLoaderForEveryDtypeAndLayout) {
  const test::TemporaryFolder folder;
  const auto config = odd_config();
  const auto base = test::tiny_flux(config, 3);
  for (const auto stored : {at::kBFloat16, at::kHalf, at::kFloat, at::kFloat8_e4m3fn}) {
    const auto tensors = with_dtype(base, stored);
    const auto file = folder / "bfl.safetensors", other = folder / "diffusers.safetensors";
    write_weights(file, tensors, {});
    write_weights(other, dit::to_diffusers(config, tensors), {});
    for (const auto dtype : {at::kBFloat16, at::kFloat, at::kHalf})
      for (const auto& path : {file, other}) {
        SCOPED_TRACE(testing::Message() << c10::toString(stored) << " as " << c10::toString(dtype)
                                        << " from " << path.filename());
        expect_matches(path, {.dtype = dtype});
      }
  }
}

TEST(ModelFile, ReadsShardsAllInOneFilesMixedDtypesAndUnalignedFiles) {
  const test::TemporaryFolder folder;
  const auto config = odd_config();
  const auto tensors = test::tiny_flux(config, 4);
  const auto diffusers = dit::to_diffusers(config, tensors);
  std::vector<fs::path> paths = {write_shards(folder / "bfl", tensors),
                                 write_shards(folder / "diffusers", diffusers),
                                 write_all_in_one(folder / "all.safetensors", tensors),
                                 write_unaligned(folder / "odd.safetensors", tensors),
                                 write_unaligned(folder / "odd2.safetensors", diffusers)};
  write_weights(folder / "mixed.safetensors", with_float_scales(tensors), {});
  paths.push_back(folder / "mixed.safetensors");
  for (const auto& path : paths)
    for (const FileAccess access :
         {FileAccess::kCached, FileAccess::kDropped, FileAccess::kDirect}) {
      SCOPED_TRACE(testing::Message() << path.filename() << " access " << static_cast<int>(access));
      expect_matches(path, {.access = access});
    }
}

TEST(ModelFile, ReadsLargeMatricesInPieces) {
  const test::TemporaryFolder folder;
  const auto config = wide_config();
  const auto tensors = test::tiny_flux(config, 5);
  write_weights(folder / "a.safetensors", dit::to_diffusers(config, tensors), {});
  expect_matches(folder / "a.safetensors", {.dtype = at::kFloat, .access = FileAccess::kDirect});
  expect_matches(folder / "a.safetensors", {.quant = QuantFormat::kFp8});
  expect_matches(folder / "a.safetensors",
                 {.quant = QuantFormat::kNf4, .access = FileAccess::kDirect});
}

TEST(ModelFile, QuantisesWhileItReads) {
  const test::TemporaryFolder folder;
  const auto config = odd_config();
  for (const auto stored : {at::kBFloat16, at::kFloat}) {
    const auto tensors = with_dtype(test::tiny_flux(config, 6), stored);
    write_weights(folder / "a.safetensors", tensors, {});
    for (const QuantFormat format : {QuantFormat::kFp8, QuantFormat::kNf4}) {
      SCOPED_TRACE(quant_format_name(format));
      expect_matches(folder / "a.safetensors", {.quant = format});
    }
  }
}

TensorMap quantised(const TensorMap& tensors, QuantFormat format) {
  TensorMap out;
  for (const auto& [name, tensor] : tensors) {
    if (!is_quantized_name(name)) {
      out[name] = tensor;
      continue;
    }
    const auto weight = quantize(tensor, format);
    out[name] = weight.codes;
    out[scale_name(name)] = weight.scales;
  }
  return out;
}

TEST(ModelFile, ReadsStoredCodesAndScalesAsTheyAre) {
  const test::TemporaryFolder folder;
  const auto config = odd_config();
  const auto tensors = test::tiny_flux(config, 7);
  write_weights(folder / "plain.safetensors", tensors, {});
  for (const QuantFormat format : {QuantFormat::kFp8, QuantFormat::kNf4}) {
    SCOPED_TRACE(quant_format_name(format));
    const auto path = folder / "q.safetensors";
    write_weights(path,
                  quantised(tensors, format),
                  {{std::string(kQuantMetadataKey), std::string(stored_quant_name(format))}});
    for (const ModelFileOptions options : {ModelFileOptions{}, ModelFileOptions{.quant = format}}) {
      const ModelFile stored(path, options);
      EXPECT_EQ(stored.quant(), format);
      EXPECT_EQ(stored.config(), config);
      EXPECT_EQ(stored.staging_bytes(), 0);
      for (int64_t i = 0; i < stored.num_records(); ++i)
        expect_reads(stored, i, expected_record(config, i, tensors, at::kBFloat16, format));
      auto to = at::empty({96, 64}, at::kBFloat16);
      stored.read_tensor("img_in.weight", to);
      EXPECT_TRUE(at::equal(to, tensors.at("img_in.weight")));
    }
    const auto other = format == QuantFormat::kFp8 ? QuantFormat::kNf4 : QuantFormat::kFp8;
    try {
      const ModelFile refused(path, {.quant = other});
      FAIL() << "accepted";
    } catch (const InputError& error) {
      EXPECT_THAT(error.what(), AllOf(HasSubstr("fp8"), HasSubstr("nf4"), HasSubstr("q.safe")));
    }
  }
}

TEST(ModelFile, HasTheIdentityOfTheWholeLoader) {
  const test::TemporaryFolder folder;
  setenv("XDG_CACHE_HOME", (folder / "cache").c_str(), 1);
  const auto config = odd_config();
  const auto tensors = with_float_scales(test::tiny_flux(config, 8));
  write_weights(folder / "a.safetensors", dit::to_diffusers(config, tensors), {});
  const auto want = weights_sha256(canonical_of(folder / "a.safetensors"));
  const ModelFile file(folder / "a.safetensors");
  EXPECT_EQ(to_hex(file.weights_sha256()), to_hex(want));
  EXPECT_EQ(to_hex(file.weights_sha256(true)), to_hex(want));
  unsetenv("XDG_CACHE_HOME");
}

TEST(ModelFile, MapsNothing) {
  const test::TemporaryFolder folder;
  const auto path = test::write_tiny_flux(folder / "mapped-nowhere.safetensors");
  const ModelFile file(path);
  std::ifstream maps("/proc/self/maps");
  const std::string text{std::istreambuf_iterator<char>(maps), std::istreambuf_iterator<char>()};
  EXPECT_EQ(text.find("mapped-nowhere"), std::string::npos);
}

TEST(ModelFile, HoldsNoMoreThanItSays) {
  const test::TemporaryFolder folder;
  const auto config = wide_config();
  write_weights(folder / "a.safetensors", with_dtype(test::tiny_flux(config, 9), at::kFloat), {});
  for (const ModelFileOptions& options :
       {ModelFileOptions{.access = FileAccess::kDirect},
        ModelFileOptions{.quant = QuantFormat::kFp8},
        ModelFileOptions{.quant = QuantFormat::kNf4, .access = FileAccess::kDirect}}) {
    const ModelFile file(folder / "a.safetensors", options);
    MemoryStore to({file.record_bytes(0), file.record_bytes(1)});
    reset_cpu_peak();
    const int64_t before = cpu_memory().live;
    file.read(0, to.record(0));
    file.read(1, to.record(1));
    EXPECT_GT(cpu_memory().peak - before, 0);
    EXPECT_LE(cpu_memory().peak - before, file.staging_bytes());
    EXPECT_EQ(cpu_memory().live, before);
  }
}

std::string refusal(const std::function<void()>& body) {
  try {
    body();
  } catch (const InputError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(ModelFile, NamesWhatIsWrongWithAFile) {
  const test::TemporaryFolder folder;
  const auto config = odd_config();
  auto tensors = test::tiny_flux(config, 10);
  tensors.erase("single_blocks.1.linear1.bias");
  write_weights(folder / "a.safetensors", tensors, {});
  EXPECT_THAT(refusal([&] { ModelFile{folder / "a.safetensors"}; }),
              HasSubstr("single_blocks.1.linear1.bias"));
  EXPECT_THAT(refusal([&] { ModelFile{folder / "absent.safetensors"}; }), HasSubstr("absent"));
  auto strange = quantised(test::tiny_flux(config, 10), QuantFormat::kFp8);
  strange.erase("double_blocks.0.img_mlp.0.weight_scale");
  write_weights(
      folder / "q.safetensors", strange, {{std::string(kQuantMetadataKey), "fp8_e4m3_block64"}});
  EXPECT_THAT(refusal([&] { ModelFile{folder / "q.safetensors"}; }),
              HasSubstr("double_blocks.0.img_mlp.0.weight_scale"));
}

TEST(ModelFile, NamesAFileThatBecomesShorter) {
  const test::TemporaryFolder folder;
  const auto path = test::write_tiny_flux(folder / "a.safetensors");
  for (const FileAccess access : {FileAccess::kCached, FileAccess::kDirect}) {
    const ModelFile file(path, {.access = access});
    fs::resize_file(path, fs::file_size(path) / 2);
    const auto read = [&] {
      for (int64_t i = 0; i < file.num_records(); ++i) {
        std::vector<std::byte> to(static_cast<size_t>(file.record_bytes(i)));
        file.read(i, to);
      }
    };
    EXPECT_THAT(refusal(read), AllOf(HasSubstr("a.safetensors"), HasSubstr("ends at byte")));
    test::write_tiny_flux(path);
  }
}

TEST(ModelFile, RefusesWrongRequests) {
  const test::TemporaryFolder folder;
  const ModelFile file(test::write_tiny_flux(folder / "a.safetensors"));
  auto to = at::empty({128, 64}, at::kFloat);
  EXPECT_NO_THROW(file.read_tensor("img_in.weight", to));
  EXPECT_THROW(file.read_tensor("img_in.wait", to), std::invalid_argument);
  EXPECT_THROW(file.read_tensor("img_in.bias", to), std::invalid_argument);
  EXPECT_THROW(file.read_tensor("img_in.weight", to.t().contiguous().t()), std::invalid_argument);
}

TEST(ModelFile, StreamsThroughARing) {
  const test::TemporaryFolder folder;
  const auto config = odd_config();
  const auto tensors = test::tiny_flux(config, 11);
  write_weights(folder / "a.safetensors", tensors, {});
  for (const auto quant : {std::optional<QuantFormat>(), std::optional(QuantFormat::kNf4)}) {
    const auto file =
        std::make_shared<ModelFile>(folder / "a.safetensors", ModelFileOptions{.quant = quant});
    Ring ring(file,
              at::Device(at::kCPU),
              forward_and_back(std::vector<int64_t>{1, 2, 3}),
              {.lookahead = 1, .read_threads = 2});
    for (int i = 0; i < 18; ++i) {
      auto lease = ring.acquire();
      const auto want = expected_record(config, lease.index, tensors, at::kBFloat16, quant);
      EXPECT_TRUE(at::equal(lease.record, want)) << "position " << i;
      ring.release(std::move(lease), false);
    }
  }
}

}  // namespace
}  // namespace flux::engine
