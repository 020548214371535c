#include "common/models/clip/clip.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/tensor/tensor.h"
#include "tests/support/golden.h"
#include "tests/support/shared_data.h"

namespace flux::clip {
namespace {

using at::Tensor;
using nlohmann::json;
using test::relative_error;
using testing::HasSubstr;

const std::filesystem::path kGolden =
    std::filesystem::path(FLUX_SOURCE_DIR) / "tests/golden/models/clip";
/// Relative limits of case.json: about four times the float32 error of the reference, twice its
/// bfloat16 error.
constexpr double kFloatLimit = 5e-6, kBFloat16Limit = 0.022;

NetTensors net_of(TensorMap tensors) {
  return {"some.safetensors", {}, "", std::move(tensors), {}};
}
TensorMap weights_in(const std::filesystem::path& folder) {
  return canonical(take_net(read_weights(folder / "weights.safetensors"), NetKind::kClip));
}
json config_in(const std::filesystem::path& folder) {
  return json::parse(read_file(folder / "config.json"));
}
TextModel model_in(const std::filesystem::path& folder, at::ScalarType dtype) {
  const TensorMap weights = weights_in(folder);
  const json config = config_in(folder);
  return TextModel::load(weights, Config::from_weights(weights, &config, folder), dtype, at::kCPU);
}

void compare(const std::filesystem::path& folder, at::ScalarType dtype, double limit) {
  const TensorMap vectors = read_weights(folder / "vectors.safetensors").tensors;
  const Output output = model_in(folder, dtype).encode(vectors.at("ids"));
  EXPECT_LE(relative_error(output.last_hidden_state, vectors.at("last_hidden_state")), limit);
  EXPECT_LE(relative_error(output.pooled, vectors.at("pooler_output")), limit);
  EXPECT_EQ(output.pooled.scalar_type(), at::kFloat);
  for (int64_t i = 0; i < output.pooled.size(0); ++i)
    EXPECT_TRUE(
        at::equal(output.pooled[i],
                  output.last_hidden_state[i][vectors.at("pool_position")[i].item<int64_t>()]));
}

/// The message with which `config.json` is refused, as changed by `change`.
std::string config_refusal(const json& change) {
  json config = config_in(kGolden);
  config.update(change);
  try {
    Config::from_weights(weights_in(kGolden), &config, "clip.safetensors");
  } catch (const InputError& e) {
    return e.what();
  }
  return "";
}

TEST(Clip, EqualsReferenceInFloat32) { compare(kGolden, at::kFloat, kFloatLimit); }
TEST(Clip, EqualsReferenceInBFloat16) { compare(kGolden, at::kBFloat16, kBFloat16Limit); }

TEST(Clip, EqualsSharedReference) {
  FLUX_SHARED_DATA_OR_SKIP(folder, "golden/models/clip");
  compare(folder, at::kFloat, kFloatLimit);
  compare(folder, at::kBFloat16, kBFloat16Limit);
}

TEST(Clip, BitsDoNotDependOnTheBatch) {
  const Tensor ids = test::golden("models/clip/vectors.safetensors").at("ids");
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const TextModel model = model_in(kGolden, dtype);
    const Output together = model.encode(ids);
    for (int64_t i = 0; i < ids.size(0); ++i)
      EXPECT_TRUE(at::equal(model.encode(ids.narrow(0, i, 1).clone()).last_hidden_state,
                            together.last_hidden_state.narrow(0, i, 1)));
  }
}

TEST(Clip, RefusesIdsItCannotEncode) {
  const TextModel model = model_in(kGolden, at::kFloat);
  EXPECT_THROW(model.encode(at::full({1, 77}, 600, at::kLong)),
               std::invalid_argument);  // outside the vocabulary
  EXPECT_THROW(model.encode(at::full({1, 77}, 5, at::kLong)),
               std::invalid_argument);  // no end token
  EXPECT_THROW(model.encode(at::full({1, 78}, 599, at::kLong)), std::invalid_argument);  // too long
}

TEST(ClipWeights, NamesWithoutTextModelAreTheSame) {
  const TensorMap weights = weights_in(kGolden);
  TensorMap bare;
  for (const auto& [name, tensor] : weights)
    bare.emplace(name.substr(std::string("text_model.").size()), tensor);
  EXPECT_EQ(weights_sha256(canonical(net_of(bare))), weights_sha256(weights));
}

TEST(ClipWeights, WholeClipGivesItsTextModel) {
  const TensorMap weights = weights_in(kGolden);
  TensorMap whole = weights;
  whole.emplace("text_model.embeddings.position_ids", at::arange(77).view({1, 77}));
  for (const char* name : {"text_projection.weight",
                           "logit_scale",
                           "vision_model.post_layernorm.weight",
                           "visual_projection.weight"})
    whole.emplace(name, at::zeros({2}));
  EXPECT_EQ(weights_sha256(canonical(net_of(whole))), weights_sha256(weights));
}

TEST(ClipWeights, HeadsComeFromConfigJsonOrAre64Wide) {
  TensorMap weights = weights_in(kGolden);
  const json config = config_in(kGolden);
  EXPECT_EQ(Config::from_weights(weights, &config, "x").num_heads, 4);
  EXPECT_EQ(Config::from_weights(weights, &config, "x").eos_id, 599);
  EXPECT_THROW(Config::from_weights(weights, nullptr, "x"), InputError);  // 80 is no multiple of 64
  weights["text_model.embeddings.token_embedding.weight"] = at::zeros({600, 128});
  EXPECT_EQ(Config::from_weights(weights, nullptr, "x").num_heads, 2);
}

TEST(ClipWeights, ConfigJsonThatContradictsIsRefused) {
  EXPECT_EQ(config_refusal(json::object()), "");
  EXPECT_EQ(config_refusal({{"eos_token_id", 2}}), "");  // a mistake of published files
  EXPECT_THAT(config_refusal({{"hidden_size", 96}}),
              HasSubstr("says hidden_size 96, the weights 80"));
  EXPECT_THAT(config_refusal({{"hidden_act", "gelu"}}), HasSubstr("hidden_act \"gelu\""));
  EXPECT_THAT(config_refusal({{"layer_norm_eps", 1e-6}}), HasSubstr("layer_norm_eps"));
  EXPECT_THAT(config_refusal({{"num_attention_heads", 3}}),
              HasSubstr("num_attention_heads 3 for a width of 80"));
  EXPECT_THAT(config_refusal({{"num_attention_heads", "four"}}), HasSubstr("no integer"));
  EXPECT_THAT(config_refusal({{"text_config", {{"hidden_size", 64}}}}),
              HasSubstr("says hidden_size 64"));
}

TEST(ClipWeights, OthersAreRefused) {
  TensorMap weights = weights_in(kGolden), clip_g = weights;
  clip_g["text_model.embeddings.token_embedding.weight"] = at::zeros({600, 1280});
  EXPECT_THROW(canonical(net_of(clip_g)), InputError);
  weights.erase("text_model.final_layer_norm.bias");
  weights.emplace("text_model.extra", at::zeros({1}));
  try {
    canonical(net_of(weights));
    FAIL();
  } catch (const InputError& e) {
    EXPECT_THAT(e.what(), HasSubstr("1 tensor missing: text_model.final_layer_norm.bias"));
    EXPECT_THAT(e.what(), HasSubstr("1 tensor surplus: text_model.extra"));
  }
}

}  // namespace
}  // namespace flux::clip
