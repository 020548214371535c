#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/core/error.h"
#include "common/models/flux/load.h"
#include "common/models/lora/layouts.h"
#include "common/models/lora/lora.h"
#include "tests/support/flux_cases.h"
#include "tests/support/golden.h"
#include "tests/support/temporary_folder.h"

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
              HasSubstr("norms of rows"));
  EXPECT_THAT(with("diffusion_model.double_blocks.0.img_attn.qkv.diff_b"), HasSubstr("no row"));
  EXPECT_THAT(with("lora_unet_double_blocks_0_img_attn_qkv.diff"),
              HasSubstr("expected [384, 128]"));
  EXPECT_THAT(with("double_blocks.0.processor.qkv_lora1.down.weight"),
              HasSubstr("half of the pair"));
  const auto with_bias = [&](const std::string& name) {
    auto tensors = good;
    tensors[name] = at::zeros({384});
    return refusal(tensors);
  };
  EXPECT_THAT(with_bias("lora_unet_double_blocks_0_img_attn_qkv.diff_b"), HasSubstr("a bias"));
  EXPECT_THAT(with_bias("double_blocks.0.img_attn.norm.query_norm.scale"),
              HasSubstr("shape [384], expected [128]"));
  auto with_norm = good;
  with_norm["double_blocks.0.img_attn.norm.query_norm.scale"] = at::zeros({config().head_dim()});
  EXPECT_THAT(refusal(with_norm), HasSubstr("replaced norms"));
  EXPECT_THAT(with_bias("bundle_emb.word.clip_l"), HasSubstr("embeddings"));
  auto with_text = good;
  with_text["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = at::zeros({2, 8});
  EXPECT_THAT(refusal(with_text), HasSubstr("half of the pair"));
  with_text["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = at::zeros({32, 2});
  EXPECT_THAT(refusal(with_text), HasSubstr("text encoders"));
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

// --- both ways

/// Everything of a file in another layout.
TensorMap convert(const TensorMap& tensors,
                  const Metadata& metadata,
                  Layout layout,
                  std::optional<at::ScalarType> dtype = std::nullopt) {
  const AdapterFile file(tensors, metadata);
  const LayoutWriter writer(layout, file.config(), dtype);
  TensorMap out;
  const auto emit = [&](const std::string& name, const at::Tensor& tensor) {
    EXPECT_FALSE(out.contains(name)) << name;
    out[name] = tensor.contiguous();
  };
  for (const Target& target : file.targets()) writer.write(file.entry(target.path), emit);
  for (const TextModule& module : file.text_modules()) writer.write(module, emit);
  for (const auto& [name, tensor] : file.replaced()) writer.write_replaced(name, tensor, emit);
  for (const auto& [name, tensor] : file.embeddings()) writer.write_embedding(name, tensor, emit);
  return out;
}

at::Tensor delta_of(const Module& given) {
  const Module m = without_lokr(given);
  return m.up.to(at::kDouble).mm(m.down.to(at::kDouble)) * m.scale();
}

void expect_same_effect(const AdapterFile& a, const AdapterFile& b) {
  ASSERT_EQ(a.targets().size(), b.targets().size());
  for (size_t i = 0; i < a.targets().size(); ++i) {
    const auto& path = a.targets()[i].path;
    ASSERT_EQ(path, b.targets()[i].path);
    const auto x = delta_of(a.entry(path).module), y = delta_of(b.entry(path).module);
    EXPECT_LE((x - y).norm().item<double>(), 1e-6 * x.norm().item<double>()) << path;
  }
}

constexpr Layout kAll[] = {Layout::kSdScripts,
                           Layout::kDiffusers,
                           Layout::kMixture,
                           Layout::kOneTrainer,
                           Layout::kComfyUi,
                           Layout::kControl,
                           Layout::kFal};

TEST(Layouts, EveryGoldenLoraHasTheSameEffectInEveryOther) {
  for (const char* name : {"kohya", "peft", "peft_metadata", "peft_as_kohya"}) {
    const auto file = golden_file(name);
    const AdapterFile original(file.tensors, file.metadata);
    EXPECT_EQ(original.config().hidden, config().hidden);
    EXPECT_EQ(original.config().mlp, config().mlp);
    EXPECT_EQ(original.config().num_double_blocks, config().num_double_blocks);
    EXPECT_EQ(original.config().num_single_blocks, config().num_single_blocks);
    for (const Layout layout : kAll) {
      SCOPED_TRACE(testing::Message() << name << " as " << layout_name(layout));
      const auto there = convert(file.tensors, file.metadata, layout);
      const AdapterFile converted(there, {});
      EXPECT_EQ(converted.layout(), layout == Layout::kOneTrainer ? Layout::kMixture : layout);
      expect_same_effect(original, converted);
      for (const Layout last : kAll) {
        SCOPED_TRACE(testing::Message() << "and " << layout_name(last));
        expect_same_effect(original, AdapterFile(convert(there, {}, last), {}));
      }
    }
  }
}

TEST(Layouts, RoundTripsToTheBit) {
  const auto kohya = golden_file("kohya"), peft = golden_file("peft");
  // alpha stays where there is one
  expect_equal(convert(convert(kohya.tensors, {}, Layout::kComfyUi), {}, Layout::kSdScripts),
               kohya.tensors);
  for (const Layout layout : kAll) {
    SCOPED_TRACE(layout_name(layout));
    expect_equal(convert(convert(peft.tensors, {}, layout), {}, Layout::kDiffusers), peft.tensors);
  }
  expect_equal(convert(peft.tensors, {}, Layout::kSdScripts), golden_file("peft_as_kohya").tensors);
}

TEST(Layouts, FusedAdaptersShareTheirDown) {
  const auto down = at::randn({4, 128}), up = at::randn({384, 4});
  const auto out = convert({{"lora_unet_double_blocks_0_txt_attn_qkv.lora_down.weight", down},
                            {"lora_unet_double_blocks_0_txt_attn_qkv.lora_up.weight", up},
                            {"lora_unet_double_blocks_0_txt_attn_qkv.alpha", at::full({}, 2.0)}},
                           {},
                           Layout::kDiffusers);
  ASSERT_EQ(out.size(), 6u);
  int64_t row = 0;
  for (const char* part : {"q", "k", "v"}) {
    const auto name = fmt::format("transformer.transformer_blocks.0.attn.add_{}_proj.lora_", part);
    EXPECT_TRUE(at::equal(out.at(name + "A.weight"), down));
    EXPECT_TRUE(at::equal(out.at(name + "B.weight"), up.narrow(0, row, 128) * 0.5));
    row += 128;
  }
}

TEST(Layouts, PartsOfSeveralRanksFallApartAgain) {
  TensorMap parts;
  const auto add = [&](const std::string& module, int64_t rank, int64_t rows) {
    const auto name = "transformer.single_transformer_blocks.1." + module + ".lora_";
    parts[name + "A.weight"] = at::randn({rank, 128});
    parts[name + "B.weight"] = at::randn({rows, rank});
  };
  add("attn.to_q", 2, 128);
  add("attn.to_v", 3, 128);
  add("proj_mlp", 5, 512);
  expect_equal(convert(convert(parts, {}, Layout::kSdScripts), {}, Layout::kDiffusers), parts);
}

TEST(Layouts, ScalesThatDoNotFitAreInFloat32) {
  auto tensors = golden_file("kohya").tensors;
  for (auto& [name, tensor] : tensors)
    if (name.ends_with(".alpha")) tensor = at::full({}, 3.0, tensor.options());
  const auto out = convert(tensors, {}, Layout::kDiffusers);
  for (const auto& [name, tensor] : out)
    EXPECT_EQ(tensor.scalar_type(),
              name.find("lora_B") == std::string::npos ? at::kBFloat16 : at::kFloat)
        << name;
  expect_same_effect(AdapterFile(tensors, {}), AdapterFile(out, {}));
  for (const auto& [name, tensor] : convert(tensors, {}, Layout::kDiffusers, at::kHalf))
    EXPECT_EQ(tensor.scalar_type(), at::kHalf) << name;
}

TEST(Layouts, MagnitudesAreSplitByRows) {
  const std::string name = "lora_unet_single_blocks_0_linear1.";
  const TensorMap dora{{name + "lora_down.weight", at::randn({4, 128})},
                       {name + "lora_up.weight", at::randn({896, 4})},
                       {name + "alpha", at::full({}, 4.0)},
                       {name + "dora_scale", at::rand({896, 1})}};
  const auto out = convert(dora, {}, Layout::kDiffusers);
  const auto magnitude =
      out.at("transformer.single_transformer_blocks.0.proj_mlp.lora_magnitude_vector");
  EXPECT_TRUE(at::equal(magnitude, dora.at(name + "dora_scale").narrow(0, 384, 512).flatten()));
  const AdapterFile back(out, {{"lora_adapter_metadata", R"({"transformer.use_dora": true})"}});
  EXPECT_TRUE(at::equal(back.entry("single_blocks.0.linear1").module.magnitude,
                        dora.at(name + "dora_scale")));
  expect_same_effect(AdapterFile(dora, {}), back);
  auto half = out;
  half.erase("transformer.single_transformer_blocks.0.proj_mlp.lora_magnitude_vector");
  EXPECT_THROW(AdapterFile(half, {}).entry("single_blocks.0.linear1"), InputError);
}

TEST(Layouts, LokrBecomesAPairOfLargerRank) {
  const std::string name = "lora_unet_double_blocks_1_txt_attn_proj.lokr_";
  const auto alpha = at::full({}, 3.0);
  const TensorMap forms[] = {
      {{name + "w1", at::randn({8, 4})},
       {name + "w2_a", at::randn({16, 2})},
       {name + "w2_b", at::randn({2, 32})}},
      {{name + "w1", at::randn({4, 8})},
       {name + "w2_a", at::randn({32, 2})},
       {name + "w2_b", at::randn({2, 16})}},
      {{name + "w1", at::randn({8, 4})}, {name + "w2", at::randn({16, 32})}},
      {{name + "w1", at::randn({4, 8})}, {name + "w2", at::randn({32, 16})}}};
  for (const auto& form : forms) {
    auto tensors = form;
    tensors["lora_unet_double_blocks_1_txt_attn_proj.alpha"] = alpha;
    const AdapterFile original(tensors, {});
    const Module m = original.entry("double_blocks.1.txt_attn.proj").module;
    const auto wanted =
        at::kron(m.mix.to(at::kDouble),
                 m.up.defined() ? m.up.mm(m.down).to(at::kDouble) : m.down.to(at::kDouble)) *
        m.scale();
    const AdapterFile pair(convert(tensors, {}, Layout::kDiffusers), {});
    const auto got = delta_of(pair.entry("double_blocks.1.txt_attn.proj").module);
    EXPECT_LE((got - wanted).norm().item<double>(), 1e-6 * wanted.norm().item<double>());
    expect_equal(convert(convert(tensors, {}, Layout::kComfyUi), {}, Layout::kSdScripts), tensors);
  }
}

TEST(Layouts, XlabsHasQkvAndProjections) {
  TensorMap xlabs;
  const auto add = [&](const std::string& module, int64_t in, int64_t out) {
    xlabs[module + ".down.weight"] = at::randn({2, in});
    xlabs[module + ".up.weight"] = at::randn({out, 2});
  };
  add("double_blocks.0.processor.qkv_lora1", 128, 384);
  add("double_blocks.1.processor.proj_lora2", 128, 128);
  add("single_blocks.0.processor.qkv_lora", 128, 384);
  add("single_blocks.2.processor.proj_lora", 640, 128);
  const AdapterFile file(xlabs, {});
  EXPECT_EQ(file.layout(), Layout::kXlabs);
  EXPECT_EQ(file.config().mlp, 512);
  EXPECT_EQ(file.entry("single_blocks.0.linear1").module.up.size(0), 896);
  for (const Layout layout : {Layout::kSdScripts, Layout::kComfyUi, Layout::kFal}) {
    SCOPED_TRACE(layout_name(layout));
    const auto there = convert(xlabs, {}, layout);
    expect_same_effect(file, AdapterFile(there, {}));
    expect_equal(convert(there, {}, Layout::kXlabs), xlabs);
  }
  expect_same_effect(file, AdapterFile(convert(xlabs, {}, Layout::kDiffusers), {}));
  EXPECT_THROW(convert(golden_file("kohya").tensors, {}, Layout::kXlabs), InputError);
}

TEST(Layouts, ControlLorasHaveBiasesNormsAndMoreInputs) {
  TensorMap control;
  const auto add = [&](const std::string& module, int64_t in, int64_t out) {
    control[module + ".lora_A.weight"] = at::randn({2, in});
    control[module + ".lora_B.weight"] = at::randn({out, 2});
    control[module + ".lora_B.bias"] = at::randn({out});
  };
  add("img_in", 128, 128);
  add("double_blocks.0.img_attn.qkv", 128, 384);
  add("single_blocks.0.linear1", 128, 896);
  add("final_layer.adaLN_modulation.1", 128, 256);
  control["double_blocks.0.img_attn.norm.query_norm.scale"] = at::randn({64});
  const AdapterFile file(control, {});
  EXPECT_EQ(file.layout(), Layout::kControl);
  EXPECT_EQ(file.config().in_channels, 128);
  EXPECT_EQ(file.config().head_dim(), 64);
  const auto comfy = convert(control, {}, Layout::kComfyUi);
  EXPECT_TRUE(comfy.contains("diffusion_model.double_blocks.0.img_attn.qkv.diff_b"));
  EXPECT_TRUE(
      comfy.contains("diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.set_weight"));
  EXPECT_TRUE(comfy.contains("diffusion_model.img_in.reshape_weight"));
  const auto diffusers = convert(control, {}, Layout::kDiffusers);
  EXPECT_TRUE(diffusers.contains("transformer.transformer_blocks.0.attn.norm_q.weight"));
  EXPECT_TRUE(diffusers.contains("transformer.transformer_blocks.0.attn.to_k.lora_B.bias"));
  for (const auto* there : {&comfy, &diffusers}) {
    const AdapterFile other(*there, {});
    expect_same_effect(file, other);
    for (const char* path : {"img_in", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1"})
      EXPECT_TRUE(at::equal(other.entry(path).bias, file.entry(path).bias)) << path;
  }
  expect_equal(convert(comfy, {}, Layout::kControl), control);
  EXPECT_THROW(convert(control, {}, Layout::kMixture), InputError);
  EXPECT_THROW(convert(control, {}, Layout::kFal), InputError);
}

TEST(Layouts, TextEncodersAndEmbeddingsComeAlong) {
  TensorMap kohya = golden_file("kohya").tensors;
  const auto add = [&](const std::string& module, int64_t in, int64_t out) {
    kohya[module + ".lora_down.weight"] = at::randn({2, in});
    kohya[module + ".lora_up.weight"] = at::randn({out, 2});
    kohya[module + ".alpha"] = at::full({}, 1.0);
  };
  add("lora_te1_text_model_encoder_layers_11_self_attn_out_proj", 32, 32);
  add("lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0", 32, 64);
  const auto diffusers = convert(kohya, {}, Layout::kDiffusers);
  EXPECT_TRUE(diffusers.contains(
      "text_encoder.text_model.encoder.layers.11.self_attn.out_proj.lora_A.weight"));
  EXPECT_TRUE(diffusers.contains(
      "text_encoder_2.encoder.block.23.layer.1.DenseReluDense.wi_0.lora_B.weight"));
  const auto comfy = convert(kohya, {}, Layout::kComfyUi);
  EXPECT_TRUE(comfy.contains(
      "text_encoders.t5xxl.transformer.encoder.block.23.layer.1.DenseReluDense.wi_0.alpha"));
  expect_equal(convert(comfy, {}, Layout::kSdScripts), kohya);
  auto onetrainer = convert(kohya, {}, Layout::kOneTrainer);
  EXPECT_TRUE(
      onetrainer.contains("lora_te2_encoder_block_23_layer_1_DenseReluDense_wi_0.lora_up.weight"));
  onetrainer["bundle_emb.word.clip_l"] = at::randn({2, 8});
  EXPECT_EQ(AdapterFile(onetrainer, {}).layout(), Layout::kOneTrainer);
  expect_equal(convert(onetrainer, {}, Layout::kOneTrainer), onetrainer);
  EXPECT_THROW(convert(onetrainer, {}, Layout::kSdScripts), InputError);
  EXPECT_THROW(convert(kohya, {}, Layout::kFal), InputError);
}

TEST(Layouts, FullDifferencesStayOrAreRefused) {
  auto comfy = convert(golden_file("kohya").tensors, {}, Layout::kComfyUi);
  comfy["diffusion_model.txt_in.diff"] = at::randn({128, 96});
  comfy["diffusion_model.txt_in.diff_b"] = at::randn({128});
  EXPECT_EQ(AdapterFile(comfy, {}).config().prompt_dim, 96);
  expect_equal(convert(convert(comfy, {}, Layout::kSdScripts), {}, Layout::kComfyUi), comfy);
  EXPECT_THROW(convert(comfy, {}, Layout::kDiffusers), InputError);
}

TEST(Layouts, PeftsConfigBesideTheFileCounts) {
  const test::TemporaryFolder folder;
  for (const Layout layout : {Layout::kFal, Layout::kDiffusers}) {
    SCOPED_TRACE(layout_name(layout));
    auto tensors = convert(golden_file("kohya").tensors, {}, layout);
    if (layout == Layout::kDiffusers) {
      TensorMap raw;
      for (const auto& [name, tensor] : tensors)
        raw["base_model.model." + name.substr(std::string_view("transformer.").size())] = tensor;
      tensors = raw;
    }
    const auto file = folder / "adapter_model.safetensors";
    folder.write("adapter_config.json",
                 R"({"r": 4, "lora_alpha": 8, "alpha_pattern": {"single_blocks.0.linear2": 2}})");
    Metadata metadata;
    add_peft_config(folder / "other.safetensors", metadata);
    EXPECT_TRUE(metadata.empty());
    add_peft_config(file, metadata);
    const auto path = "double_blocks.0.img_attn.proj";
    EXPECT_EQ(AdapterFile(tensors, metadata).entry(path).module.scale(), 2);
    EXPECT_EQ(AdapterFile(tensors, {}).entry(path).module.scale(), 1);
    if (layout == Layout::kFal) {
      EXPECT_EQ(AdapterFile(tensors, metadata).entry("single_blocks.0.linear2").module.scale(),
                0.5);
    }
    folder.write("adapter_config.json", "[");
    metadata.clear();
    EXPECT_THROW(add_peft_config(folder.path(), metadata), InputError);
  }
}

TEST(Layouts, HaveWords) {
  for (const Layout layout : kAll) {
    const auto word = layout_name(layout);
    const auto found = std::ranges::find(
        layout_words(), word, [](const auto& w) { return std::string_view(w.first); });
    ASSERT_NE(found, layout_words().end());
    EXPECT_EQ(found->second, layout);
  }
}

}  // namespace
}  // namespace flux::lora
