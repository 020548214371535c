#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/core/error.h"
#include "common/models/flux/load.h"
#include "common/models/lora/lora.h"
#include "tests/support/flux_cases.h"
#include "tests/support/golden.h"

namespace flux::lora {
namespace {

dit::Config config() {
  return dit::read_config(take_net(
      read_weights(test::golden_models() / "flux/weights_bfl.safetensors"), NetKind::kFlux));
}
WeightFile golden_file(const std::string& name) {
  return read_weights(test::golden_models() / ("lora/" + name + ".safetensors"));
}

void expect_equal(const TensorMap& got, const TensorMap& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (const auto& [name, tensor] : expected) {
    ASSERT_TRUE(got.contains(name)) << name;
    EXPECT_EQ(got.at(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(got.at(name), tensor)) << name;
  }
}

TEST(ToKohya, IsTheInverseOfReading) {
  const auto file = golden_file("kohya");
  const auto adapters = from_tensors(file.tensors, file.metadata, config());
  EXPECT_EQ(adapters.modules.size(), default_targets(config()).size());
  EXPECT_EQ(adapters.modules[0].alpha, 2);
  EXPECT_EQ(adapters.modules[0].rank(), 4);
  expect_equal(to_kohya(adapters, at::kBFloat16), file.tensors);
}

TEST(FromTensors, FusesPeftExactly) {
  const auto file = golden_file("peft");
  expect_equal(to_kohya(from_tensors(file.tensors, file.metadata, config()), at::kBFloat16),
               golden_file("peft_as_kohya").tensors);
}

TEST(FromTensors, ReadsScalesFromPeftsMetadata) {
  const auto file = golden_file("peft_metadata");
  for (const auto& module : from_tensors(file.tensors, file.metadata, config()).modules)
    EXPECT_DOUBLE_EQ(module.alpha / static_cast<double>(module.rank()), 1.5) << module.path;
  const Metadata pattern{
      {"lora_adapter_metadata",
       R"({"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"to_k": 6}})"}};
  const auto plain = from_tensors(file.tensors, {}, config());
  const auto with_pattern = from_tensors(file.tensors, pattern, config());
  for (size_t i = 0; i < plain.modules.size(); ++i) {
    if (plain.modules[i].path != "double_blocks.0.img_attn.qkv") continue;
    // scales 1, 3, 1 cannot be one alpha: they are in the ups
    EXPECT_EQ(with_pattern.modules[i].alpha, 6);
    const auto expected = plain.modules[i].up.to(at::kFloat).clone();
    expected.narrow(0, 128, 128).mul_(3);
    EXPECT_TRUE(at::equal(with_pattern.modules[i].up, expected));
  }
}

TEST(FromTensors, MissingPartsAreZero) {
  auto file = golden_file("peft");
  const auto whole = from_tensors(file.tensors, {}, config());
  std::erase_if(file.tensors, [](const auto& entry) {
    return entry.first.find("single_transformer_blocks.0.proj_mlp") != std::string::npos;
  });
  const auto part = from_tensors(file.tensors, {}, config());
  for (size_t i = 0; i < whole.modules.size(); ++i) {
    if (whole.modules[i].path != "single_blocks.0.linear1") continue;
    EXPECT_EQ(part.modules[i].rank(), 6);
    EXPECT_EQ(part.modules[i].alpha, 6);
    EXPECT_EQ(part.modules[i].up.size(0), 896);
    EXPECT_EQ(part.modules[i].up.narrow(0, 384, 512).to(at::kFloat).abs().max().item<float>(), 0);
  }
}

TEST(FromTensors, ReadsBflPaths) {
  const auto down = at::randn({3, 128}), up = at::randn({384, 3});
  for (const std::string prefix : {"diffusion_model.", "base_model.model."}) {
    const auto adapters =
        from_tensors({{prefix + "double_blocks.1.txt_attn.qkv.lora_A.weight", down},
                      {prefix + "double_blocks.1.txt_attn.qkv.lora_B.weight", up}},
                     {},
                     config());
    ASSERT_EQ(adapters.modules.size(), 1u);
    EXPECT_EQ(adapters.modules[0].path, "double_blocks.1.txt_attn.qkv");
    EXPECT_EQ(adapters.modules[0].alpha, 3);
    EXPECT_TRUE(at::equal(adapters.modules[0].up, up));
  }
}

TEST(FromTensors, ReadsEveryFormOfLokr) {
  const std::string name = "lora_unet_double_blocks_1_txt_attn_proj.lokr_";
  const auto alpha = at::full({}, 3.0);
  const auto delta = [](const Adapters& adapters) {
    const Module& m = adapters.modules.at(0);
    return at::kron(m.mix, m.up.defined() ? m.up.mm(m.down) : m.down) * m.scale();
  };
  const auto w1a = at::randn({8, 2}), w1b = at::randn({2, 4}), w2a = at::randn({16, 2}),
             w2b = at::randn({2, 32});
  const auto w1 = w1a.mm(w1b), w2 = w2a.mm(w2b);
  const auto read = [&](const TensorMap& parts) {
    TensorMap tensors{{"lora_unet_double_blocks_1_txt_attn_proj.alpha", alpha}};
    for (const auto& [part, tensor] : parts) tensors[name + part] = tensor;
    return delta(from_tensors(tensors, {}, config()));
  };
  const auto expected = at::kron(w1, w2);
  // scale alpha / rank, but for two whole matrices, as LyCORIS has it
  EXPECT_TRUE(read({{"w1", w1}, {"w2", w2}}).allclose(expected, 1e-4, 1e-5));
  EXPECT_TRUE(
      read({{"w1", w1}, {"w2_a", w2a}, {"w2_b", w2b}}).allclose(expected * 1.5, 1e-4, 1e-5));
  EXPECT_TRUE(
      read({{"w1_a", w1a}, {"w1_b", w1b}, {"w2", w2}}).allclose(expected * 1.5, 1e-4, 1e-5));
  EXPECT_TRUE(read({{"w1_a", w1a}, {"w1_b", w1b}, {"w2_a", w2a}, {"w2_b", w2b}})
                  .allclose(expected * 1.5, 1e-4, 1e-5));
}

TEST(FromTensors, RefusesByName) {
  const auto refusal = [](const TensorMap& tensors, const Metadata& metadata = {}) -> std::string {
    try {
      from_tensors(tensors, metadata, config());
    } catch (const InputError& error) {
      return error.what();
    }
    return "accepted";
  };
  const auto good = golden_file("kohya").tensors;
  const auto with = [&](const std::string& name) {
    auto tensors = good;
    tensors[name] = at::zeros({2, 2});
    return refusal(tensors);
  };
  using testing::HasSubstr;
  EXPECT_EQ(refusal(good), "accepted");
  EXPECT_THAT(with("lora_unet_double_blocks_7_img_attn_qkv.lora_down.weight"),
              HasSubstr("no layer of this name"));
  EXPECT_THAT(with("lora_unet_double_blocks_0_img_attn_qkv.lokr_w1"),
              HasSubstr("do not fit a layer"));
  EXPECT_THAT(with("lora_unet_double_blocks_0_img_attn_qkv.lokr_w2"), HasSubstr("a second pair"));
  EXPECT_THAT(with("lora_unet_double_blocks_0_img_attn_qkv.lokr_w1_a"), HasSubstr("lokr_w1_b"));
  EXPECT_THAT(with("lora_unet_double_blocks_0_img_attn_qkv.lokr_t2"), HasSubstr("convolutions"));
  EXPECT_THAT(with("lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a"), HasSubstr("LoHa"));
  EXPECT_THAT(with("lora_unet_double_blocks_0_img_attn_qkv.dora_scale"),
              HasSubstr("norms of rows"));
  EXPECT_THAT(with("transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"),
              HasSubstr("DoRA of PEFT"));
  EXPECT_THAT(with("diffusion_model.double_blocks.0.img_attn.qkv.diff_b"),
              HasSubstr("full differences"));
  EXPECT_THAT(with("double_blocks.0.img_attn.qkv.lora_B.bias"), HasSubstr("control LoRA"));
  EXPECT_THAT(with("double_blocks.0.processor.qkv_lora1.down.weight"), HasSubstr("XLabs"));
  EXPECT_THAT(with("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
              HasSubstr("text encoders"));
  EXPECT_THAT(with("lora_unet_final_layer_linear.lora_up.weight"), HasSubstr("half of the pair"));
  auto misshapen = good;
  misshapen.at("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight") = at::zeros({4, 100});
  EXPECT_THAT(refusal(misshapen), HasSubstr("[4, 100]"));
  EXPECT_THAT(refusal({}), HasSubstr("no LoRA"));
  EXPECT_THAT(refusal(golden_file("peft").tensors,
                      {{"lora_adapter_metadata", R"({"transformer.use_dora": true})"}}),
              HasSubstr("use_dora"));
  EXPECT_THAT(refusal(golden_file("peft").tensors, {{"lora_adapter_metadata", "{"}}),
              HasSubstr("lora_adapter_metadata"));
}

}  // namespace
}  // namespace flux::lora
