#include "common/models/t5/t5.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/core/error.h"
#include "common/models/t5/stream.h"
#include "common/tensor/tensor.h"
#include "tests/support/golden.h"
#include "tests/support/shared_data.h"

namespace flux::t5 {
namespace {

using at::Tensor;
using test::relative_error;
using testing::HasSubstr;

const std::filesystem::path kGolden =
    std::filesystem::path(FLUX_SOURCE_DIR) / "tests/golden/models/t5";
/// Relative limits of case.json: about four times the float32 error of the reference, twice its
/// bfloat16 error.
constexpr double kFloatLimit = 5e-6, kBFloat16Limit = 0.016;
constexpr const char* kShared = "shared.weight";
constexpr const char* kEmbedTokens = "encoder.embed_tokens.weight";

NetTensors net_of(TensorMap tensors) {
  return {"some.safetensors", {}, "", std::move(tensors), {}};
}
TensorMap weights_in(const std::filesystem::path& folder) {
  return canonical(take_net(read_weights(folder / "weights.safetensors"), NetKind::kT5));
}
Encoder load(const TensorMap& weights, at::ScalarType dtype) {
  return Encoder::load(weights, Config::from_weights(weights, "some.safetensors"), dtype, at::kCPU);
}

void compare(const std::filesystem::path& folder, at::ScalarType dtype, double limit) {
  const TensorMap vectors = read_weights(folder / "vectors.safetensors").tensors;
  const Encoder encoder = load(weights_in(folder), dtype);
  for (const std::string name : {"length512.", "length256."}) {
    SCOPED_TRACE(name);
    const Tensor ids = vectors.at(name + "ids"), mask = vectors.at(name + "mask");
    EXPECT_LE(relative_error(encoder.encode(ids), vectors.at(name + "no_mask.output")), limit);
    const Tensor masked = encoder.encode(ids, mask), wanted = vectors.at(name + "masked.output");
    EXPECT_LE(relative_error(masked.narrow(1, 0, wanted.size(1)), wanted), limit);
    EXPECT_EQ(masked.narrow(1, wanted.size(1), ids.size(1) - wanted.size(1))
                  .count_nonzero()
                  .item<int64_t>(),
              0);
  }
}

std::string refusal(const TensorMap& tensors) {
  try {
    canonical(take_net({"some.safetensors", {}, tensors, {}}, NetKind::kT5));
  } catch (const InputError& e) {
    return e.what();
  }
  return "";
}

TEST(T5, EqualsReferenceInFloat32) { compare(kGolden, at::kFloat, kFloatLimit); }
TEST(T5, EqualsReferenceInBFloat16) { compare(kGolden, at::kBFloat16, kBFloat16Limit); }

TEST(T5, EqualsSharedReference) {
  FLUX_SHARED_DATA_OR_SKIP(folder, "golden/models/t5");
  compare(folder, at::kFloat, kFloatLimit);
  compare(folder, at::kBFloat16, kBFloat16Limit);
}

/// Batches of random captions through the layers of a file, each layer once.
std::vector<Tensor> through_stream(const File& file,
                                   at::ScalarType dtype,
                                   const std::vector<std::pair<Tensor, Tensor>>& captions) {
  const Encoder encoder = file.load_outer(dtype, at::kCPU);
  LayerStream layers(file, dtype, at::kCPU);
  std::vector<Batch> batches;
  for (const auto& [ids, mask] : captions) batches.push_back(encoder.begin(ids, mask));
  Scratch scratch;
  layers.each([&](int64_t, const Layer& layer) {
    for (Batch& batch : batches) encoder.run_layer(layer, batch, scratch);
  });
  std::vector<Tensor> out;
  for (const Batch& batch : batches) out.push_back(encoder.finish(batch));
  return out;
}

TEST(T5Stream, HasTheBitsOfTheResidentEncoder) {
  const File file(kGolden / "weights.safetensors");
  const auto gen = at::make_generator<at::CPUGeneratorImpl>(8);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Encoder mapped = load(weights_in(kGolden), dtype);
    const Encoder read = file.load(dtype, at::kCPU);
    for (const int64_t length : {64, 200}) {
      const Tensor mask = at::arange(length).unsqueeze(0) <
                          at::tensor({length, int64_t{3}, int64_t{40}}).unsqueeze(1);
      Tensor holes = mask.clone();
      holes.narrow(1, 1, 1).fill_(false);
      std::vector<std::pair<Tensor, Tensor>> captions;
      for (const Tensor& m : {Tensor(), mask, holes, Tensor()})
        captions.emplace_back(at::randint(0, 512, {3, length}, gen, at::kLong), m);
      const auto streamed = through_stream(file, dtype, captions);
      for (size_t i = 0; i < captions.size(); ++i) {
        const auto& [ids, m] = captions[i];
        EXPECT_TRUE(at::equal(streamed[i], mapped.encode(ids, m))) << i;
        EXPECT_TRUE(at::equal(streamed[i], read.encode(ids, m))) << i;
      }
    }
  }
}

TEST(T5Stream, GoesOnAfterAPassThatFailed) {
  const File file(kGolden / "weights.safetensors");
  LayerStream layers(file, at::kFloat, at::kCPU);
  EXPECT_THROW(layers.each([](int64_t, const Layer&) { throw std::runtime_error("no"); }),
               std::runtime_error);
  std::vector<int64_t> seen;
  layers.each([&](int64_t i, const Layer&) { seen.push_back(i); });
  EXPECT_EQ(std::ssize(seen), file.config().num_layers);
  EXPECT_EQ(seen.front(), 0);
}

TEST(T5Stream, KnowsTheFileWithoutReadingIt) {
  const File file(kGolden / "weights.safetensors");
  const TensorMap weights = weights_in(kGolden);
  EXPECT_EQ(file.weights_sha256(true), weights_sha256(weights));
  int64_t bytes = 0;
  for (const auto& [name, tensor] : weights)
    bytes += tensor.numel() * (name == kShared ? tensor.element_size() : 4);
  EXPECT_NEAR(static_cast<double>(file.bytes(at::kFloat)), static_cast<double>(bytes), 16384);
}

TEST(T5, RelativeBucketsAreThoseOfTheReference) {
  const TensorMap vectors = test::golden("models/t5/vectors.safetensors");
  const Tensor relative = vectors.at("bias.relative"), bucket = vectors.at("bias.bucket");
  for (int64_t i = 0; i < relative.numel(); ++i)
    EXPECT_EQ(relative_bucket(relative[i].item<int64_t>()), bucket[i].item<int64_t>())
        << relative[i].item<int64_t>();
  EXPECT_EQ(relative_bucket(100000), 31);
  EXPECT_EQ(relative_bucket(-100000), 15);
}

TEST(T5, MaskWithHolesEqualsTheTokensThatAreLeft) {  // attention sees positions only through their
                                                     // differences
  const Encoder encoder = load(weights_in(kGolden), at::kFloat);
  const Tensor ids = at::arange(2, 26).view({1, 24});
  Tensor mask = at::zeros({1, 24}, at::kLong);
  mask.narrow(1, 5, 9).fill_(1);
  const Tensor whole = encoder.encode(ids, mask),
               part = encoder.encode(ids.narrow(1, 5, 9).clone());
  EXPECT_LE(relative_error(whole.narrow(1, 5, 9), part), kFloatLimit);
}

TEST(T5, BitsDoNotDependOnTheBatch) {
  const TensorMap weights = weights_in(kGolden);
  const auto gen = at::make_generator<at::CPUGeneratorImpl>(5);
  const Tensor ids = at::randint(0, 512, {3, 77}, gen, at::kLong);
  const Tensor mask = at::arange(77).unsqueeze(0) < at::tensor({77, 3, 40}).unsqueeze(1);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Encoder encoder = load(weights, dtype);
    const Tensor together = encoder.encode(ids), masked = encoder.encode(ids, mask);
    for (int64_t i = 0; i < 3; ++i) {
      const Tensor row = ids.narrow(0, i, 1).clone();
      EXPECT_TRUE(at::equal(encoder.encode(row), together.narrow(0, i, 1)));
      EXPECT_TRUE(
          at::equal(encoder.encode(row, mask.narrow(0, i, 1).clone()), masked.narrow(0, i, 1)));
    }
  }
}

TEST(T5, BitsOfMaskedCaptionsDoNotDependOnTheirPlaceAmongSeveralTiles) {
  const Encoder encoder = load(weights_in(kGolden), at::kBFloat16);
  const auto gen = at::make_generator<at::CPUGeneratorImpl>(6);
  const std::vector<int64_t> lengths = {
      90, 200, 1, 130, 77, 60};  // 558 rows: three tiles, with captions across
  const Tensor ids = at::randint(0, 512, {6, 200}, gen, at::kLong);
  const Tensor mask = at::arange(200).unsqueeze(0) < at::tensor(lengths).unsqueeze(1);
  const Tensor together = encoder.encode(ids, mask);
  const Tensor backwards = encoder.encode(ids.flip(0), mask.flip(0)).flip(0);
  EXPECT_TRUE(at::equal(together, backwards));
  for (int64_t i = 0; i < 6; ++i) {
    const Tensor alone = encoder.encode(ids.narrow(0, i, 1).clone(), mask.narrow(0, i, 1).clone());
    EXPECT_TRUE(at::equal(alone, together.narrow(0, i, 1))) << i;
  }
}

TEST(T5, RefusesIdsOutsideTheVocabulary) {
  const Encoder encoder = load(weights_in(kGolden), at::kFloat);
  EXPECT_THROW(encoder.encode(at::full({1, 4}, 512, at::kLong)), std::invalid_argument);
  EXPECT_THROW(encoder.encode(at::full({1, 4}, -1, at::kLong)), std::invalid_argument);
  EXPECT_THROW(encoder.encode(at::zeros({4}, at::kLong)), std::invalid_argument);
  EXPECT_THROW(encoder.encode(at::zeros({1, 4}, at::kLong), at::zeros({1, 3}, at::kLong)),
               std::invalid_argument);
  EXPECT_THROW(encoder.encode(at::zeros({1, 4}, at::kLong), at::zeros({1, 4}, at::kLong)),
               std::invalid_argument);
}

TEST(T5Weights, SizesAreReadOffTheCheckpoint) {
  const Config config = Config::from_weights(weights_in(kGolden), "x");
  EXPECT_EQ(config.width, 96);
  EXPECT_EQ(config.num_layers, 3);
  EXPECT_EQ(config.num_heads, 4);
  EXPECT_EQ(config.head_size, 16);
  EXPECT_EQ(config.mlp, 128);
  EXPECT_EQ(config.vocabulary, 512);
}

TEST(T5Weights, TokenTableUnderEitherOrBothNames) {
  const TensorMap weights = weights_in(kGolden);
  TensorMap other = weights, both = weights;
  auto node = other.extract(kShared);
  node.key() = kEmbedTokens;
  other.insert(std::move(node));
  both.emplace(kEmbedTokens, weights.at(kShared));
  both.emplace("decoder.final_layer_norm.weight", at::zeros({96}));
  both.emplace("lm_head.weight", at::zeros({512, 96}));
  EXPECT_EQ(weights_sha256(canonical(net_of(other))), weights_sha256(weights));
  EXPECT_EQ(weights_sha256(canonical(net_of(both))), weights_sha256(weights));
}

TEST(T5Weights, PlainFloat8IsRead) {  // every tensor one byte, norms and the token table too
  TensorMap weights = weights_in(kGolden), decoded = weights;
  for (auto& [name, tensor] : weights) {
    tensor = to_dtype(tensor.to(at::kFloat), at::kFloat8_e4m3fn);
    decoded[name] = to_dtype(tensor, at::kFloat);
  }
  const Tensor ids = at::arange(2, 34).view({1, 32});
  EXPECT_TRUE(at::equal(load(canonical(net_of(weights)), at::kFloat).encode(ids),
                        load(decoded, at::kFloat).encode(ids)));
}

TEST(T5Weights, RelativesAreRefusedByName) {
  TensorMap umt5 = weights_in(kGolden), v1_0 = umt5, scaled = umt5;
  umt5.emplace("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
               at::zeros({32, 4}));
  EXPECT_THAT(refusal(umt5), HasSubstr("umT5"));
  v1_0.erase("encoder.block.0.layer.1.DenseReluDense.wi_0.weight");
  v1_0.emplace("encoder.block.0.layer.1.DenseReluDense.wi.weight", at::zeros({128, 96}));
  EXPECT_THAT(refusal(v1_0), HasSubstr("T5 v1.0"));
  scaled.emplace("scaled_fp8", at::zeros({1}));
  EXPECT_THAT(refusal(scaled), HasSubstr("scaled fp8"));
}

TEST(T5Weights, MissingSurplusAndMisshapenAreListedTogether) {
  TensorMap weights = weights_in(kGolden);
  weights.erase("encoder.block.2.layer.1.DenseReluDense.wo.weight");
  weights.emplace("encoder.block.0.extra", at::zeros({1}));
  weights["encoder.final_layer_norm.weight"] = at::zeros({3});
  const std::string message = refusal(weights);
  EXPECT_THAT(message,
              HasSubstr("1 tensor missing: encoder.block.2.layer.1.DenseReluDense.wo.weight"));
  EXPECT_THAT(message, HasSubstr("1 tensor surplus: encoder.block.0.extra"));
  EXPECT_THAT(message, HasSubstr("encoder.final_layer_norm.weight is [3], expected [96]"));
}

}  // namespace
}  // namespace flux::t5
