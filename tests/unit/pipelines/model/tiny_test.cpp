#include "pipelines/model/tiny.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/models/clip/clip.h"
#include "common/models/flux/load.h"
#include "common/models/flux/packing.h"
#include "common/models/flux/transformer.h"
#include "common/models/t5/t5.h"
#include "common/models/vae/vae.h"
#include "common/tokenizers/clip_bpe.h"
#include "common/tokenizers/t5_unigram.h"
#include "formats/safetensors/reader.h"
#include "pipelines/model/info.h"
#include "tests/support/temporary_folder.h"

namespace flux::model {
namespace {

namespace fs = std::filesystem;
using test::TemporaryFolder;
using testing::HasSubstr;

constexpr const char* kNets[] = {
    "flux.safetensors", "ae.safetensors", "t5.safetensors", "clip.safetensors"};
constexpr const char* kVocabularies[] = {
    "tokenizers/t5/spiece.model", "tokenizers/clip/vocab.json", "tokenizers/clip/merges.txt"};

std::string hash(const fs::path& path) { return to_hex(sha256_file(path)); }

double deviation(const at::Tensor& tensor) { return tensor.to(at::kDouble).std().item<double>(); }

class TinyModels : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder = new TemporaryFolder;
    tiny({.out = *folder / "seed 7", .seed = 7});
    tiny({.out = *folder / "seed 8", .seed = 8});
  }
  static void TearDownTestSuite() { delete folder; }
  static fs::path seven() { return *folder / "seed 7"; }
  static fs::path eight() { return *folder / "seed 8"; }
  static inline TemporaryFolder* folder = nullptr;
};

TEST_F(TinyModels, AreTheSameBytesOnEveryMachine) {  // recorded; a change of these is a change of
                                                     // what a seed means
  EXPECT_EQ(hash(seven() / "flux.safetensors"),
            "3547d22028ce399affc7c7e725eb3ef96ec8aa5b4cf3425325664846f360826e");
  EXPECT_EQ(hash(seven() / "ae.safetensors"),
            "1396b4bfceb6555675ccdfd1b5d0c2cb192d752231f4fc1c16807e968b7e60b5");
  EXPECT_EQ(hash(seven() / "t5.safetensors"),
            "c93393d8c44b39128fcbf0a1499e4e419e9e21d44580efa01e98769b9b03f148");
  EXPECT_EQ(hash(seven() / "clip.safetensors"),
            "49c8631a0f6991c9376b265176f1deb087b9c1e4556b54eb6761c8a3b15ab42d");
}

TEST_F(TinyModels, DifferBySeedInValuesOnly) {
  for (const char* name : kVocabularies)
    EXPECT_EQ(hash(seven() / name), hash(eight() / name)) << name;
  for (const char* name : kNets) {
    const auto a = safetensors::File::open(seven() / name),
               b = safetensors::File::open(eight() / name);
    ASSERT_EQ(a->tensors().size(), b->tensors().size());
    for (const safetensors::Tensor& tensor : a->tensors()) {
      const safetensors::Tensor* other = b->find(tensor.name);
      ASSERT_NE(other, nullptr);
      EXPECT_EQ(tensor.shape, other->shape);
      EXPECT_EQ(tensor.dtype, other->dtype);
      EXPECT_FALSE(std::equal(tensor.bytes.begin(), tensor.bytes.end(), other->bytes.begin()))
          << tensor.name;
    }
  }
}

TEST_F(TinyModels, AreSizedToTheVocabulariesGiven) {
  TemporaryFolder other;  // the project's own ones, given: the same models
  tiny({.out = other / "m",
        .seed = 7,
        .t5_tokenizer = seven() / "tokenizers/t5/spiece.model",
        .clip_tokenizer = seven() / "tokenizers/clip"});
  for (const char* name : kNets) EXPECT_EQ(hash(other / "m" / name), hash(seven() / name)) << name;
  for (const char* name : kVocabularies)
    EXPECT_EQ(hash(other / "m" / name), hash(seven() / name)) << name;
  EXPECT_THROW(tiny({.out = other / "n", .t5_tokenizer = other / "absent"}), InputError);
  EXPECT_FALSE(fs::exists(other / "n"));
}

TEST_F(TinyModels, CarrySignalsOfTheRightSize) {
  const at::Device cpu(at::kCPU);
  const auto gen = at::make_generator<at::CPUGeneratorImpl>(1);
  const auto ae =
      vae::canonical(take_net(read_weights(seven() / "ae.safetensors"), NetKind::kAutoEncoder));
  const auto ae_config = vae::Config::from_weights(ae, seven());
  const auto image = at::rand({1, 3, 64, 64}, gen) * 2 - 1;
  const auto posterior = vae::Encoder::load(ae, ae_config, at::kFloat, cpu).encode(image);
  EXPECT_NEAR(deviation(vae::scale_latents(posterior.mean)), 1.0, 0.5);
  EXPECT_LT(posterior.logvar.max().item<double>(), -3.0);
  EXPECT_LT(vae::Decoder::load(ae, ae_config, at::kFloat, cpu)
                .decode(posterior.mean)
                .abs()
                .max()
                .item<double>(),
            20.0);

  const auto t5_tokenizer = tokenizers::T5Tokenizer::load(seven() / "tokenizers/t5");
  const auto t5 = t5::canonical(take_net(read_weights(seven() / "t5.safetensors"), NetKind::kT5));
  const auto padded = t5_tokenizer.padded(t5_tokenizer.encode("a red cat"), 64);
  const auto txt = t5::Encoder::load(t5, t5::Config::from_weights(t5, seven()), at::kFloat, cpu)
                       .encode(at::tensor(padded.ids).to(at::kLong).unsqueeze(0));
  EXPECT_NEAR(deviation(txt), 1.0, 0.3);

  const auto clip_tokenizer = tokenizers::ClipTokenizer::load(seven() / "tokenizers/clip");
  const auto clip =
      clip::canonical(take_net(read_weights(seven() / "clip.safetensors"), NetKind::kClip));
  const auto ids = clip_tokenizer.padded(clip_tokenizer.encode("a red cat"), 77).ids;
  const auto y = clip::TextModel::load(
                     clip, clip::Config::from_weights(clip, nullptr, seven()), at::kFloat, cpu)
                     .encode(at::tensor(ids).to(at::kLong).unsqueeze(0))
                     .pooled;
  EXPECT_NEAR(deviation(y), 1.0, 0.3);

  const auto flux = dit::load_model(seven() / "flux.safetensors", at::kFloat);
  const auto noise = at::randn({1, 16, 8, 8}, gen);
  const auto velocity = dit::forward(flux.config,
                                     flux.weights,
                                     {.img = dit::pack_latents(noise),
                                      .txt = txt,
                                      .y = y,
                                      .timestep = at::tensor({0.5f}),
                                      .guidance = at::tensor({1.0f}),
                                      .img_ids = dit::image_ids(8, 8),
                                      .txt_ids = dit::text_ids(64),
                                      .text_mask = {}});
  EXPECT_NEAR(deviation(velocity), 1.5, 0.75);
}

TEST_F(TinyModels, AreDescribedByInfo) {
  setenv("XDG_CACHE_HOME", (*folder / "cache").c_str(), 1);
  InfoOptions options;
  for (const char* name : kNets) options.files.push_back(seven() / name);
  const InfoReport report = info(options);
  ASSERT_EQ(report.nets.size(), 4u);
  EXPECT_EQ(report.nets[0]["kind"], "flux");
  EXPECT_EQ(report.nets[0]["layout"], "bfl");
  EXPECT_EQ(report.nets[0]["config"]["guidance"], true);
  EXPECT_EQ(report.nets[0]["dtypes"], nlohmann::json({{"BF16", report.nets[0]["tensors"]}}));
  EXPECT_EQ(report.nets[1]["kind"], "vae");
  EXPECT_EQ(report.nets[1]["encoder_weights_sha256"].get<std::string>().size(), 64u);
  EXPECT_NE(report.nets[1]["encoder_weights_sha256"], report.nets[1]["weights_sha256"]);
  EXPECT_FALSE(report.nets[0].contains("encoder_weights_sha256"));
  EXPECT_EQ(report.nets[2]["config"]["width"], report.nets[0]["config"]["prompt_dim"]);
  EXPECT_EQ(report.nets[3]["config"]["hidden"], report.nets[0]["config"]["pooled_dim"]);
  EXPECT_THAT(report.text(), HasSubstr("weights_sha256"));
}

TEST(ModelInfo, RefusesByName) {
  TemporaryFolder folder;
  write_weights(
      folder / "lora.safetensors", {{"lora_unet_x.lora_down.weight", at::zeros({1, 1})}}, {});
  const auto message = [](const fs::path& path) -> std::string {
    try {
      InfoOptions options;
      options.files = {path};
      info(options);
    } catch (const InputError& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_THAT(message(folder / "lora.safetensors"), HasSubstr("a LoRA"));
  EXPECT_THAT(message(folder.write("x.gguf", "GGUF....................")), HasSubstr("GGUF"));
  EXPECT_THAT(message(folder / "absent"), HasSubstr("absent"));
  EXPECT_THROW(check(InfoOptions{}), UsageError);
}

}  // namespace
}  // namespace flux::model
