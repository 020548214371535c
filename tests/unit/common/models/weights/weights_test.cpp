#include "common/models/weights/weights.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <chrono>
#include <cstdlib>
#include <thread>

#include "common/core/error.h"
#include "common/core/text.h"
#include "tests/support/temporary_folder.h"

namespace flux {
namespace {

using test::TemporaryFolder;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

WeightFile file_with(const std::vector<std::string>& names,
                     std::filesystem::path path = "some.safetensors") {
  WeightFile file{std::move(path), {}, {}, {}};
  for (const std::string& name : names) file.tensors.emplace(name, at::zeros({2, 3}));
  return file;
}

std::string refusal(const WeightFile& file, NetKind kind) {
  try {
    take_net(file, kind);
  } catch (const InputError& e) {
    return e.what();
  }
  return "";
}

const std::string kFluxName = "double_blocks.0.img_attn.qkv.weight";
const std::string kVaeName = "encoder.down.0.block.0.norm1.weight";
const std::string kT5Name = "encoder.block.0.layer.0.SelfAttention.q.weight";
const std::string kClipName = "text_model.embeddings.token_embedding.weight";

TEST(TakeNet, KeepsPlainNames) {
  const NetTensors net = take_net(file_with({kFluxName, "img_in.weight", "odd"}), NetKind::kFlux);
  EXPECT_EQ(net.prefix, "");
  EXPECT_EQ(net.tensors.size(), 3u);
}

TEST(TakeNet, FindsEveryNetOfAnAllInOneFile) {
  const WeightFile file = file_with({"model.diffusion_model." + kFluxName,
                                     "vae." + kVaeName,
                                     "text_encoders.t5xxl.transformer." + kT5Name,
                                     "text_encoders.clip_l.transformer." + kClipName,
                                     "text_encoders.t5xxl.logit_scale"});
  EXPECT_EQ(nets_in(file),
            (std::vector{NetKind::kFlux, NetKind::kAutoEncoder, NetKind::kT5, NetKind::kClip}));
  for (const auto& [kind, name] : {std::pair(NetKind::kFlux, kFluxName),
                                   {NetKind::kAutoEncoder, kVaeName},
                                   {NetKind::kT5, kT5Name},
                                   {NetKind::kClip, kClipName}}) {
    const NetTensors net = take_net(file, kind);
    ASSERT_EQ(net.tensors.size(), 1u) << net.prefix;
    EXPECT_EQ(net.tensors.begin()->first, name);
  }
}

TEST(TakeNet, LeavesStrangeTensorsForTheListOfSurplus) {
  const NetTensors net =
      take_net(file_with({"transformer." + kFluxName, "transformr.img_in.weight"}), NetKind::kFlux);
  EXPECT_TRUE(net.tensors.contains("transformr.img_in.weight"));
}

TEST(TakeNet, SaysWhatTheFileHoldsInstead) {
  EXPECT_THAT(refusal(file_with({kFluxName}), NetKind::kAutoEncoder),
              AllOf(HasSubstr("no autoencoder"), HasSubstr("FLUX transformer")));
  EXPECT_THAT(refusal(file_with({"a", "b"}), NetKind::kT5), HasSubstr("2 tensors: a, b"));
}

TEST(TakeNet, RefusesOtherKindsByName) {
  const std::tuple<std::vector<std::string>, NetKind, std::string> kCases[] = {
      {{kFluxName, "double_blocks.0.img_attn.qkv.scale_weight"}, NetKind::kFlux, "scaled fp8"},
      {{kFluxName, "scaled_fp8"}, NetKind::kFlux, "scaled fp8"},
      {{kFluxName, kFluxName + ".absmax"}, NetKind::kFlux, "bitsandbytes"},
      {{"model.diffusion_model." + kFluxName,
        "model.diffusion_model.distilled_guidance_layer.norms.0.scale"},
       NetKind::kFlux,
       "Chroma"},
      {{kFluxName, "double_stream_modulation_img.lin.weight"}, NetKind::kFlux, "FLUX.2"},
      {{"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"}, NetKind::kFlux, "LoRA"},
      {{"transformer.transformer_blocks.0.attn.to_q.lora_A.weight"}, NetKind::kFlux, "LoRA"},
      {{kVaeName, "quant_conv.weight"}, NetKind::kAutoEncoder, "Stable Diffusion"},
      {{kT5Name, "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"},
       NetKind::kT5,
       "umT5"},
      {{kT5Name, "encoder.block.0.layer.1.DenseReluDense.wi.weight"}, NetKind::kT5, "T5 v1.0"},
  };
  for (const auto& [names, kind, word] : kCases)
    EXPECT_THAT(refusal(file_with(names), kind), HasSubstr(word)) << names.back();
}

TEST(TakeNet, RefusesFillControlAndKontext) {
  WeightFile file = file_with({kFluxName});
  file.tensors["img_in.weight"] = at::zeros({8, 384});
  EXPECT_THAT(refusal(file, NetKind::kFlux), HasSubstr("Fill"));
  file.tensors["img_in.weight"] = at::zeros({8, 128});
  EXPECT_THAT(refusal(file, NetKind::kFlux), HasSubstr("Control"));
  file.tensors["img_in.weight"] = at::zeros({8, 64});
  EXPECT_EQ(refusal(file, NetKind::kFlux), "");
  file.path = "flux1-dev-Kontext_fp8.safetensors";
  EXPECT_THAT(refusal(file, NetKind::kFlux), HasSubstr("Kontext"));
  file.path = "models/FLUX.1-Kontext-dev/transformer";
  EXPECT_THAT(refusal(file, NetKind::kFlux), HasSubstr("Kontext"));
}

TEST(ExpectTensors, ListsAllThatIsWrongInOneMessage) {
  const TensorMap tensors{{"a", at::zeros({2, 3})},
                          {"b", at::zeros({2})},
                          {"c", at::zeros({1})},
                          {"extra.x", at::zeros({1})},
                          {"odd\n", at::zeros({1})}};
  const ShapeMap expected{{"a", {2, 3}}, {"b", {3}}, {"d", {1}}, {"e", {1}}};
  try {
    expect_tensors("f.safetensors", "net", tensors, expected, {"c", "extra.*"});
    FAIL();
  } catch (const InputError& e) {
    EXPECT_THAT(e.what(),
                AllOf(HasSubstr("2 tensors missing: d, e"),
                      HasSubstr("1 tensor surplus: odd\\n"),
                      HasSubstr("1 tensor of another shape: b is [2], expected [3]"),
                      Not(HasSubstr("extra"))));
  }
  const TensorMap kept = expect_tensors("f",
                                        "net",
                                        {{"a", at::zeros({2, 3})}, {"extra.x", at::zeros({1})}},
                                        {{"a", {2, 3}}},
                                        {"extra.*"});
  EXPECT_EQ(kept.size(), 1u);
  try {
    expect_tensors("f", "net", {{"a", at::zeros({2, 3}, at::kLong)}}, {{"a", {2, 3}}}, {});
    FAIL();
  } catch (const InputError& e) {
    EXPECT_THAT(e.what(), HasSubstr("1 tensor not of BF16, F16, F32 or F8_E4M3: a is I64"));
  }
}

TEST(WeightsSha256, IsTheDocumentedBytes) {
  const TensorMap weights{{"w", at::tensor({1.0f, -2.0f}).to(at::kBFloat16)},
                          {"b", at::zeros({1, 0})}};
  using namespace std::string_literals;
  const auto word = [](char low) { return std::string(1, low) + std::string(7, '\0'); };
  const std::string bytes =
      "flux-stages weights_sha256 1\0"s + word(2) +                              //
      word(1) + "b" + word(3) + "F32" + word(2) + word(1) + word(0) + word(0) +  //
      word(1) + "w" + word(4) + "BF16" + word(1) + word(2) + word(4) + "\x80\x3f\x00\xc0"s;
  EXPECT_EQ(to_hex(weights_sha256(weights)), to_hex(sha256(bytes)));
}

TEST(WeightsSha256, SeesEveryPartOfATensor) {
  const auto of = [](const char* name, const at::Tensor& tensor) {
    return to_hex(weights_sha256({{name, tensor}}));
  };
  const at::Tensor tensor = at::arange(6, at::kFloat).view({2, 3});
  const std::string base = of("w", tensor);
  EXPECT_EQ(of("w", tensor.t().contiguous().t()), base);  // strides do not matter
  EXPECT_NE(of("v", tensor), base);
  EXPECT_NE(of("w", tensor.view({3, 2})), base);
  EXPECT_NE(of("w", tensor.view(at::kInt)), base);
  EXPECT_NE(of("w", tensor + 1), base);
}

class WeightsMemo : public testing::Test {
 protected:
  void SetUp() override {
    setenv("XDG_CACHE_HOME", (folder / "cache").c_str(), 1);
    write_weights(folder / "w.safetensors", {{"w", at::ones({3})}}, {});
    file = read_weights(folder / "w.safetensors");
    std::this_thread::sleep_for(std::chrono::milliseconds(1100));  // young files are not remembered
  }
  /// What the memo says of the file, seen by giving other tensors with it.
  std::string ask(bool rehash = false) {
    return to_hex(
        remembered_weights_sha256(file.stamps, "flux", {{"other", at::zeros({1})}}, rehash));
  }
  const std::string other = to_hex(weights_sha256({{"other", at::zeros({1})}}));
  TemporaryFolder folder;
  WeightFile file;
};

TEST_F(WeightsMemo, RemembersUntilTheFileChanges) {
  const std::string hash = to_hex(remembered_weights_sha256(file.stamps, "flux", file.tensors));
  EXPECT_NE(hash, other);
  EXPECT_EQ(ask(), hash);
  EXPECT_EQ(to_hex(remembered_weights_sha256(file.stamps, "vae", {{"other", at::zeros({1})}})),
            other);             // another net
  EXPECT_EQ(ask(true), other);  // and that is remembered now
  EXPECT_EQ(ask(), other);
  write_weights(folder / "w.safetensors", {{"w", at::zeros({3})}}, {});
  file = read_weights(folder / "w.safetensors");
  EXPECT_EQ(to_hex(remembered_weights_sha256(file.stamps, "flux", file.tensors)),
            to_hex(weights_sha256({{"w", at::zeros({3})}})));
}

TEST_F(WeightsMemo, DoesNotRememberAChangeMeanwhile) {
  write_weights(
      folder / "w.safetensors", {{"w", at::zeros({3})}}, {});  // `file` holds the old bytes
  remembered_weights_sha256(file.stamps, "flux", file.tensors);
  EXPECT_EQ(ask(), other);
}

TEST_F(WeightsMemo, SurvivesDamage) {
  for (const char* text :
       {"",
        "{",
        "[]",
        R"({"entries":[]})",
        R"({"entries":{"x":1,"y":{"sha256":2,"used":3},"z":{"sha256":"no"}}})"}) {
    folder.write("cache/flux-stages/hashes.json", text);
    EXPECT_EQ(ask(), other) << text;
  }
}

TEST_F(WeightsMemo, NeverAnswersWithADamagedDigit) {
  const std::string hash = to_hex(remembered_weights_sha256(file.stamps, "flux", file.tensors));
  const auto path = folder / "cache/flux-stages/hashes.json";
  const std::string good = read_file(path);
  for (size_t i = 0; i < good.size(); ++i) {
    std::string bad = good;
    bad[i] = bad[i] == '7' ? '8' : '7';
    folder.write("cache/flux-stages/hashes.json", bad);
    const std::string found = ask();
    EXPECT_TRUE(found == hash || found == other) << "byte " << i;
  }
}

TEST_F(WeightsMemo, NeedsNoCacheFolder) {
  setenv("XDG_CACHE_HOME", "/proc/nowhere", 1);
  EXPECT_EQ(ask(), other);
}

}  // namespace
}  // namespace flux
