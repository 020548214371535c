// The flags of --method lora: each has its effect, and none depends on where weights are or on interruptions.
#include "pipelines/train/lora_options.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "common/core/file.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/tensor/weight_file.h"
#include "tests/support/training_scene.h"

namespace flux::train {
namespace {

using test::message_of;
using testing::AllOf;
using testing::HasSubstr;

const std::vector<std::string> kAll{"--module-ranks",
                                    "img_attn=8,txt_mlp=0,single_mod=2,img_in=3,vector_in=2",
                                    "--rank-of",
                                    "txt_attn.proj=5",
                                    "--lr-of",
                                    "single_blocks=2e-3,qkv=5e-4",
                                    "--loraplus-lr-ratio",
                                    "4",
                                    "--scale-weight-norms",
                                    "0.05",
                                    "--network-dropout",
                                    "0.2",
                                    "--rank-dropout",
                                    "0.1",
                                    "--module-dropout",
                                    "0.1"};

/// A tiny run with flags as the user gives them.
struct Scene : test::TrainingScene {
  explicit Scene(std::vector<std::string> flags = {}) {
    const Options defaults = options;
    for (const auto& [name, value] :
         std::map<std::string, std::string>{{"--latents", defaults.latents.native()},
                                            {"--text", defaults.text.native()},
                                            {"--model", defaults.model.native()},
                                            {"--out", defaults.out.native()},
                                            {"--rank", "4"},
                                            {"--max-steps", "4"},
                                            {"--learning-rate", "1e-3"},
                                            {"--seed", "5"},
                                            {"--device", "cpu"}}) {
      if (std::ranges::count(flags, name) > 0) continue;
      if (name == "--rank" && std::ranges::count(flags, "full") > 0) continue;
      flags.push_back(name);
      flags.push_back(value);
    }
    Tool tool("flux-train", flags);
    options = Options();
    add_flags(options, tool);
    tool.parse();
    check(options, tool);
  }
  TensorMap saved() const {
    return read_weights(options.out / "step-000004/state.safetensors").tensors;
  }
  std::string saved_bytes(const char* name) const {
    return read_file(options.out / "step-000004" / name);
  }
};

/// The adapters after a run with these flags.
TensorMap trained(const std::vector<std::string>& flags) {
  const Scene scene(flags);
  run(scene.options);
  return scene.saved();
}

std::string refused(const std::vector<std::string>& flags) {
  try {
    return message_of(Scene(flags).options);
  } catch (const UsageError& error) {
    return error.what();
  }
}

constexpr char kSingleUp[] = "lora.single_blocks.0.linear1.up";
constexpr char kQkvUp[] = "lora.double_blocks.0.img_attn.qkv.up";

TEST(LoraOptions, SelectModulesAndRanks) {
  EXPECT_EQ(trained({}).at(kQkvUp).size(1), 4);
  const auto single = trained({"--train-blocks", "single"});
  EXPECT_FALSE(single.contains(kQkvUp));
  EXPECT_TRUE(single.contains(kSingleUp));
  const auto none = trained({"--train-single-blocks", "none"});
  EXPECT_TRUE(none.contains(kQkvUp));
  EXPECT_FALSE(none.contains(kSingleUp));
  EXPECT_FALSE(trained({"--train-double-blocks", "none"}).contains(kQkvUp));
  const auto ranks =
      trained({"--module-ranks", "img_attn=8,txt_mlp=0,img_in=2", "--rank-of", "linear1=3"});
  EXPECT_EQ(ranks.at(kQkvUp).size(1), 8);
  EXPECT_EQ(ranks.at(kSingleUp).size(1), 3);
  EXPECT_EQ(ranks.at("lora.single_blocks.0.linear2.up").size(1), 4);
  EXPECT_FALSE(ranks.contains("lora.double_blocks.0.txt_mlp.0.up"));
  EXPECT_GT(ranks.at("lora.img_in.up").abs().max().item<float>(), 0);
}

TEST(LoraOptions, ALearningRateOfItsOwnMovesAModuleFurther) {
  // Adam's first steps are as long as the rate, whatever the gradient
  const auto step = [](const TensorMap& tensors, const char* name) {
    return tensors.at(name).abs().max().item<double>();
  };
  const std::vector<std::string> plain{"--max-grad-norm", "0", "--weight-decay", "0"};
  const auto with = [&](std::vector<std::string> flags) {
    flags.insert(flags.end(), plain.begin(), plain.end());
    return trained(flags);
  };
  const auto base = with({}), own = with({"--lr-of", "single_blocks=8e-3"}),
             plus = with({"--loraplus-lr-ratio", "8"});
  EXPECT_NEAR(step(own, kSingleUp) / step(base, kSingleUp), 8, 3);
  EXPECT_NEAR(step(own, kQkvUp) / step(base, kQkvUp), 1, 0.3);
  EXPECT_NEAR(step(plus, kSingleUp) / step(base, kSingleUp), 8, 3);
  EXPECT_NEAR(step(plus, kQkvUp) / step(base, kQkvUp), 8, 3);
}

TEST(LoraOptions, GroupsOfLearningRatesAreInTheMetrics) {
  Scene scene({"--lr-of", "qkv=5e-4", "--loraplus-lr-ratio", "2"});
  run(scene.options);
  const auto line =
      nlohmann::json::parse(split(read_file(scene.options.out / "metrics.jsonl"), '\n')[0]);
  EXPECT_EQ(line["learning_rates"],
            (nlohmann::json{{"other", 1e-3}, {"other up", 2e-3}, {"qkv", 5e-4}, {"qkv up", 1e-3}}));
}

const std::vector<std::vector<std::string>> kForms{
    {"--dora"},
    {"--network-algo", "lokr", "--lokr-factor", "4"},
    {"--network-algo", "lokr", "--dora", "--module-dropout", "0.1", "--scale-weight-norms", "0.5"},
    {"--dora",
     "--network-dropout",
     "0.2",
     "--rank-dropout",
     "0.1",
     "--loraplus-lr-ratio",
     "4",
     "--alpha",
     "2"}};

TEST(LoraOptions, LokrAndDoraTrainWhatTheySay) {
  const auto first_loss = [](const std::vector<std::string>& flags) {
    const Scene scene(flags);
    return std::pair{*run(scene.options).loss_first, scene.saved()};
  };
  const auto [base_loss, base] = first_loss({});
  const auto [dora_loss, dora] = first_loss({"--dora"});
  EXPECT_EQ(dora_loss, base_loss);  // of the base, to the bit
  EXPECT_EQ(dora.at("lora.single_blocks.0.linear1.magnitude").sizes(),
            (at::IntArrayRef{base.at(kSingleUp).size(0), 1}));
  // magnitudes start at the norms of the weights and move
  Scene still({"--dora", "--learning-rate", "1e-12", "--weight-decay", "0"});
  run(still.options);
  const auto weights = read_weights(still.options.model).tensors;
  const auto start = still.saved();
  for (const char* layer : {"single_blocks.0.linear1", "double_blocks.0.img_attn.qkv"}) {
    const std::string name = std::string("lora.") + layer + ".magnitude";
    const auto norms = weights.at(std::string(layer) + ".weight").to(at::kFloat).norm(2, {1}, true);
    EXPECT_TRUE(start.at(name).allclose(norms, 1e-5, 1e-7)) << name;
    EXPECT_FALSE(dora.at(name).allclose(norms, 1e-5, 1e-7)) << name;
  }
  const auto [lokr_loss, lokr] = first_loss({"--network-algo", "lokr", "--lokr-factor", "4"});
  EXPECT_EQ(lokr_loss, base_loss);
  EXPECT_EQ(lokr.at("lora.single_blocks.0.linear1.mix").size(1), 4);
  EXPECT_GT(lokr.at(kSingleUp).abs().max().item<float>(), 0);
  EXPECT_NE(trained({"--network-algo", "lokr", "--lokr-factor", "2"})
                .at("lora.single_blocks.0.linear1.mix")
                .numel(),
            lokr.at("lora.single_blocks.0.linear1.mix").numel());
}

TEST(LoraOptions, LokrAndDoraLearn) {
  for (auto flags : kForms) {
    flags.insert(flags.end(), {"--max-steps", "40", "--learning-rate", "3e-3"});
    Scene scene(flags);
    run(scene.options);
    // the same three items again and again; losses of a step alone are noise
    const auto lines = split(read_file(scene.options.out / "metrics.jsonl"), '\n');
    const auto mean = [&](size_t first) {
      double sum = 0;
      for (size_t i = 0; i < 10; ++i)
        sum += nlohmann::json::parse(lines.at(first + i)).at("loss").get<double>();
      return sum / 10;
    };
    EXPECT_LT(mean(30), mean(0)) << flags[0] << ' ' << flags[1];
  }
}

TEST(LoraOptions, LokrAndDoraAreTheSameWhereverWeightsAreAndResume) {
  for (auto flags : kForms)
    for (const std::string accumulation : {"1", "2"})
      for (const std::string base : {"bf16", "nf4"}) {
        flags.insert(flags.end(),
                     {"--gradient-accumulation", accumulation, "--base-precision", base});
        SCOPED_TRACE(testing::Message() << flags[0] << ' ' << flags.size());
        Scene all(flags), streamed(flags), adapters(flags), halves(flags);
        all.options.kept_graphs = 0;
        for (Scene* scene : {&streamed, &adapters, &halves}) {
          scene->options.resident_blocks = scene == &halves ? 1 : 0;
          scene->options.kept_graphs = 0;
          scene->options.block_inputs = engine::InputPlace::kDisk;
          scene->options.stream_adapters = scene != &streamed;
        }
        run(all.options);
        halves.options.max_steps = 2;
        run(halves.options);
        halves.options.max_steps = 4;
        halves.options.resume = true;
        for (Scene* scene : {&streamed, &adapters, &halves}) {
          run(scene->options);
          for (const char* name : {"lora.safetensors", "state.safetensors"})
            EXPECT_TRUE(scene->saved_bytes(name) == all.saved_bytes(name)) << name;
        }
        flags.resize(flags.size() - 4);
      }
}

TEST(LoraOptions, LokrAndDoraSaveAsLycorisDoes) {
  Scene scene({"--network-algo", "lokr", "--lokr-factor", "4", "--dora"});
  run(scene.options);
  const auto file = read_weights(scene.options.out / "step-000004/lora.safetensors");
  EXPECT_TRUE(file.tensors.contains("lora_unet_single_blocks_0_linear1.lokr_w1"));
  EXPECT_EQ(file.tensors.at("lora_unet_single_blocks_0_linear1.dora_scale").scalar_type(),
            at::kFloat);
  EXPECT_EQ(file.metadata.at("ss_network_module"), "lycoris.kohya");
  EXPECT_EQ(nlohmann::json::parse(file.metadata.at("ss_network_args")),
            (nlohmann::json{
                {"algo", "lokr"}, {"factor", "4"}, {"dora_wd", "True"}, {"wd_on_output", "True"}}));
}

TEST(LoraOptions, LokrRefusesWhatItHasNot) {
  for (const char* flag : {"--network-dropout", "--rank-dropout"})
    EXPECT_THAT(refused({"--network-algo", "lokr", flag, "0.1"}),
                AllOf(HasSubstr(flag), HasSubstr("no effect with --network-algo lokr")));
  EXPECT_THAT(refused({"--network-algo", "lokr", "--loraplus-lr-ratio", "2"}),
              HasSubstr("--loraplus-lr-ratio has no effect"));
  EXPECT_THAT(refused({"--lokr-factor", "4"}), HasSubstr("--lokr-factor has no effect"));
  for (const char* value : {"0", "1", "-2", "x", "5000"})
    EXPECT_THAT(refused({"--network-algo", "lokr", "--lokr-factor", value}),
                AllOf(HasSubstr("--lokr-factor"), HasSubstr("[2, 4096]")));
  EXPECT_THAT(refused({"--method", "full", "--dora"}), HasSubstr("--dora has no effect"));
  EXPECT_THAT(refused({"--method", "full", "--network-algo", "lokr"}), HasSubstr("--network-algo"));
}

TEST(LoraOptions, NormsAreLimited) {
  const auto norms = [](const TensorMap& tensors) {
    std::vector<double> out;
    for (const auto& [name, up] : tensors) {
      if (!name.starts_with("lora.") || !name.ends_with(".up")) continue;
      const auto& down = tensors.at(name.substr(0, name.size() - 2) + "down");
      out.push_back(up.mm(down).norm().item<double>());  // alpha is the rank
    }
    return out;
  };
  EXPECT_GT(std::ranges::max(norms(trained({}))), 0.02);
  const auto limited = norms(trained({"--scale-weight-norms", "0.01"}));
  EXPECT_LE(std::ranges::max(limited), 0.01 * 1.001);
  EXPECT_GT(std::ranges::max(limited), 0.0099);
}

TEST(LoraOptions, EachDropoutChangesWhatIsTrained) {
  const auto base = trained({});
  for (const char* flag : {"--network-dropout", "--rank-dropout", "--module-dropout"}) {
    const auto once = trained({flag, "0.5"});
    EXPECT_FALSE(at::equal(once.at(kQkvUp), base.at(kQkvUp))) << flag;
    EXPECT_TRUE(at::equal(once.at(kQkvUp), trained({flag, "0.5"}).at(kQkvUp))) << flag;
    EXPECT_TRUE(once.at(kQkvUp).isfinite().all().item<bool>()) << flag;
  }
}

TEST(LoraOptions, WhereWeightsAreAndKeptGraphsChangeNoBit) {
  for (const std::string accumulation : {"1", "2"}) {
    auto flags = kAll;
    flags.insert(flags.end(), {"--gradient-accumulation", accumulation});
    Scene all(flags), kept(flags), streamed(flags), adapters(flags);
    all.options.kept_graphs = 0;
    kept.options.kept_graphs = 2;
    for (Scene* scene : {&streamed, &adapters}) {
      scene->options.resident_blocks = 0;
      scene->options.kept_graphs = 0;
      scene->options.block_inputs = engine::InputPlace::kDisk;
    }
    adapters.options.stream_adapters = true;
    run(all.options);
    for (Scene* scene : {&kept, &streamed, &adapters}) {
      run(scene->options);
      for (const char* name : {"lora.safetensors", "state.safetensors"})
        EXPECT_TRUE(scene->saved_bytes(name) == all.saved_bytes(name)) << name;
    }
  }
}

TEST(LoraOptions, AdaptersOfSomeBlocksAloneStream) {
  for (const char* family : {"double", "single"}) {
    Scene all({"--train-blocks", family}), streamed({"--train-blocks", family});
    all.options.kept_graphs = 2;
    streamed.options.resident_blocks = 1;  // so that those of "double" all stay
    streamed.options.stream_adapters = true;
    run(all.options);
    run(streamed.options);
    EXPECT_TRUE(streamed.saved_bytes("lora.safetensors") == all.saved_bytes("lora.safetensors"))
        << family;
  }
}

TEST(LoraOptions, ResumeBitForBit) {
  Scene straight(kAll), halves(kAll);
  run(straight.options);
  halves.options.max_steps = 2;
  run(halves.options);
  halves.options.max_steps = 4;
  halves.options.resume = true;
  run(halves.options);
  EXPECT_TRUE(straight.saved_bytes("lora.safetensors") == halves.saved_bytes("lora.safetensors"));
  EXPECT_TRUE(straight.saved_bytes("state.safetensors") == halves.saved_bytes("state.safetensors"));
}

TEST(LoraOptions, ResumeRefusesAnotherValueOfEach) {
  Scene scene({"--module-dropout", "0.1"});
  run(scene.options);
  scene.options.resume = true;
  const auto with = [&](const std::function<void(Options&)>& change) {
    Options options = scene.options;
    change(options);
    return message_of(options);
  };
  using O = Options;
  EXPECT_EQ(message_of(scene.options), "no error");
  for (const auto& [flag, change] : std::map<std::string, std::function<void(O&)>>{
           {"--train-blocks", [](O& o) { o.lora.blocks = lora::Family::kSingle; }},
           {"--train-double-blocks", [](O& o) { o.lora.double_blocks = "none"; }},
           {"--train-single-blocks", [](O& o) { o.lora.single_blocks = "none"; }},
           {"--module-ranks", [](O& o) { o.alpha = 4, o.lora.ranks_of_types["single"] = 2; }},
           {"--rank-of", [](O& o) { o.alpha = 4, o.lora.ranks = lora::PathRules("qkv=2", 0, 9); }},
           {"--lr-of", [](O& o) { o.lr_of = lora::PathRules("qkv=2", 0, 9); }},
           {"--loraplus-lr-ratio", [](O& o) { o.loraplus_lr_ratio = 2; }},
           {"--scale-weight-norms", [](O& o) { o.scale_weight_norms = 2; }},
           {"--network-dropout", [](O& o) { o.network_dropout = 0.1; }},
           {"--rank-dropout", [](O& o) { o.rank_dropout = 0.1; }},
           {"--dora", [](O& o) { o.lora_form.dora = true; }},
           {"--lokr-factor",
            [](O& o) { o.lora_form.algorithm = lora::Algorithm::kLokr, o.lora_form.factor = 4; }},
           {"--module-dropout", [](O& o) { o.module_dropout = 0.2; }}})
    EXPECT_THAT(with(change), AllOf(HasSubstr(flag + " is"), HasSubstr("was made with"))) << flag;
}

TEST(LoraOptions, RunTomlSaysAllOfThem) {
  const Scene given(kAll);
  const auto file = given.folder / "again.toml";
  write_file_atomic(file, run_toml(given.options));
  Tool tool("flux-train", {"--config", file.native()});
  Options again;
  add_flags(again, tool);
  tool.parse();
  check(again, tool);
  EXPECT_EQ(deciding_options(again), deciding_options(given.options));
}

TEST(LoraOptions, MetadataSaysThemInSdScriptsWords) {
  const Scene scene(kAll);
  run(scene.options);
  const auto metadata = read_weights(scene.options.out / "step-000004/lora.safetensors").metadata;
  EXPECT_EQ(metadata.at("ss_network_dropout"), "0.2");
  EXPECT_EQ(metadata.at("ss_scale_weight_norms"), "0.05");
  EXPECT_EQ(nlohmann::json::parse(metadata.at("ss_network_args")),
            (nlohmann::json{{"img_attn_dim", "8"},
                            {"txt_mlp_dim", "0"},
                            {"single_mod_dim", "2"},
                            {"in_dims", "3,0,2,0,0"},
                            {"network_reg_dims", "txt_attn.proj=5"},
                            {"network_reg_lrs", "single_blocks=2e-3,qkv=5e-4"},
                            {"loraplus_lr_ratio", "4.0"},
                            {"rank_dropout", "0.1"},
                            {"module_dropout", "0.1"}}));
  EXPECT_EQ(nlohmann::json::parse(network_args(
                Scene({"--train-blocks", "double", "--train-double-blocks", "0"}).options)),
            (nlohmann::json{{"train_blocks", "double"}, {"train_double_block_indices", "0"}}));
}

TEST(LoraOptions, RefusesWhatHasNoEffect) {
  EXPECT_THAT(refused({"--train-blocks", "double", "--train-single-blocks", "0"}),
              HasSubstr("--train-single-blocks has no effect"));
  EXPECT_THAT(refused({"--train-single-blocks", "0-1"}), HasSubstr("block 1"));
  EXPECT_THAT(refused({"--lr-of", "linear3=1e-3"}),
              AllOf(HasSubstr("--lr-of"), HasSubstr("linear3")));
  EXPECT_THAT(refused({"--lr-of", "double=1e-3", "--train-blocks", "single"}),
              HasSubstr("--lr-of"));
  EXPECT_THAT(refused({"--module-ranks", "single_mode=4"}),
              AllOf(HasSubstr("--module-ranks"), HasSubstr("did you mean single_mod?")));
  for (const char* flag : {"--network-dropout", "--rank-dropout", "--module-dropout"})
    EXPECT_THAT(refused({flag, "1"}), HasSubstr(flag));
  EXPECT_THAT(refused({"--method", "full", "--network-dropout", "0.1"}),
              HasSubstr("--method full"));
}

}  // namespace
}  // namespace flux::train
