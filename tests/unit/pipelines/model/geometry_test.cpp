#include "pipelines/model/geometry.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/models/flux/load.h"
#include "common/models/flux/names.h"
#include "common/models/flux/packing.h"
#include "common/models/flux/transformer.h"
#include "pipelines/model/random_values.h"
#include "pipelines/model/tiny.h"
#include "tests/support/temporary_folder.h"

namespace flux::model {
namespace {

namespace fs = std::filesystem;
using test::TemporaryFolder;
using testing::HasSubstr;

const std::map<std::string, std::string> kMetadata{{"format", "pt"}, {"flux_stages.random", "x"}};

ShapeMap shapes_of(const dit::Config& config) {
  ShapeMap shapes;
  for (const auto& [name, shape] : dit::tensor_shapes(config)) shapes.emplace(name, shape);
  return shapes;
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

TEST(RandomValues, HaveTheMeanAndDeviationAskedFor) {
  std::vector<uint16_t> bits(1 << 20);
  fill_random(0x123456789ABCDEF0u, 0, 1.0f, 0.25f, 1 << 20, bits.data());
  const auto values = at::from_blob(bits.data(), {1 << 20}, at::kBFloat16).to(at::kDouble);
  EXPECT_NEAR(values.mean().item<double>(), 1.0, 1e-3);
  EXPECT_NEAR(values.std().item<double>(), 0.25, 1e-3);
  EXPECT_GT(values.max().item<double>(), 1 + 0.25 * 3);  // and of the shape of a bell
  EXPECT_NEAR((values.sub(1).abs() < 0.25).to(at::kDouble).mean().item<double>(), 0.68, 0.02);
  // neighbours have nothing to do with each other
  const auto centred = values - values.mean();
  EXPECT_LT((centred.slice(0, 1) * centred.slice(0, 0, -1)).mean().abs().item<double>(),
            0.0625 * 0.005);
}

TEST(RandomValues, DoNotDependOnHowTheyAreAskedFor) {
  std::vector<uint16_t> whole(1000), parts(1000), other(1000);
  fill_random(7, 0, 0, 1, 1000, whole.data());
  fill_random(7, 0, 0, 1, 333, parts.data());
  fill_random(7, 333, 0, 1, 667, parts.data() + 333);
  fill_random(8, 0, 0, 1, 1000, other.data());
  EXPECT_EQ(whole, parts);
  EXPECT_NE(whole, other);
  EXPECT_EQ(whole[0], 0x3F13) << "recorded: what a seed means";
}

// A whole depth, small: signals must neither vanish nor overflow.
TEST(RandomNet, KeepsSignalsFiniteThroughThePublishedDepth) {
  const TemporaryFolder folder;
  const dit::Config config{
      .pooled_dim = 32, .prompt_dim = 48, .hidden = 128, .mlp = 512, .num_heads = 2};
  ASSERT_EQ(config.num_double_blocks, 19);
  ASSERT_EQ(config.num_single_blocks, 38);
  const auto path = folder / "flux.safetensors";
  const int64_t bytes = write_random_net(path, "flux", 3, shapes_of(config), flux_scale, kMetadata);
  EXPECT_EQ(bytes, static_cast<int64_t>(fs::file_size(path)));
  const auto model = dit::load_model(path, at::kBFloat16);
  EXPECT_EQ(model.config.num_parameters(), config.num_parameters());
  EXPECT_TRUE(model.config.guidance);
  at::manual_seed(1);
  const auto type = at::kBFloat16;
  const auto velocity = dit::forward(model.config,
                                     model.weights,
                                     {.img = dit::pack_latents(at::randn({1, 16, 8, 8})).to(type),
                                      .txt = at::randn({1, 8, 48}).to(type),
                                      .y = at::randn({1, 32}).to(type),
                                      .timestep = at::tensor({0.5f}),
                                      .guidance = at::tensor({1.0f}),
                                      .img_ids = dit::image_ids(8, 8),
                                      .txt_ids = dit::text_ids(8),
                                      .text_mask = {}})
                            .to(at::kDouble);
  EXPECT_NEAR(velocity.std().item<double>(), 1.5, 1.0);
}

TEST(RandomNet, IsTheSameForASeedAndTakesPiecesOfTensors) {
  const TemporaryFolder folder;
  const ShapeMap shapes{{"a.weight", {1100, 1024}}, {"b.bias", {5}}, {"none", {0, 4}}};  // 2 pieces
  const auto write = [&](const char* name, uint64_t seed) {
    write_random_net(folder / name, "flux", seed, shapes, flux_scale, kMetadata);
    return to_hex(sha256_file(folder / name));
  };
  const std::string first = write("a", 1);
  EXPECT_EQ(write("b", 1), first);
  EXPECT_NE(write("c", 2), first);
  const auto tensor = read_weights(folder / "a").tensors.at("a.weight").to(at::kDouble);
  EXPECT_NEAR(tensor.std().item<double>(), 1 / 32.0, 1e-3);
  EXPECT_FALSE(at::equal(tensor[0], tensor[1024]));  // the second piece goes on
}

TEST(RandomNet, SaysHowMuchSpaceIsNeededBeforeItWrites) {
  const TemporaryFolder folder;
  ShapeMap shapes;
  // more than any disk has
  for (int i = 0; i < 100000; ++i) shapes[std::to_string(i)] = {1 << 16, 1 << 16};
  const std::string message = message_of<ResourceError>(
      [&] { write_random_net(folder / "deep/er/x", "flux", 1, shapes, flux_scale, kMetadata); });
  EXPECT_THAT(message, HasSubstr(": 8589934"));  // 100000 x 8 GiB and a header
  EXPECT_THAT(message, HasSubstr("bytes are needed (781"));
  EXPECT_FALSE(fs::exists(folder / "deep"));
}

TEST(RandomNet, LeavesNothingWhenItIsStopped) {
  const TemporaryFolder folder;
  cancel::set(ExitCode::kInterrupt);
  EXPECT_THROW(
      write_random_net(folder / "x", "flux", 1, {{"a", {100, 100}}}, flux_scale, kMetadata),
      Interrupted);
  cancel::set(std::nullopt);
  EXPECT_TRUE(fs::is_empty(folder.path()));
}

TEST(Geometry, ReplacesOnlyWhatItMade) {
  const TemporaryFolder folder;
  const auto file = folder.write("flux.safetensors", "somebody's");
  EXPECT_THAT(message_of<UsageError>([&] {
                write_geometry({.geometry = Geometry::kDev, .depth = {}, .out = folder.path()});
              }),
              HasSubstr("no weights that --geometry made"));
  EXPECT_EQ(read_file(file), "somebody's");
}

TEST(Geometry, ReadsDepths) {
  EXPECT_EQ(parse_depth("19,38", Geometry::kDev).second, 38);
  EXPECT_EQ(parse_depth("2", Geometry::kT5Xxl).first, 2);
  for (const char* text : {"", "1", "1,2,3", "0,1", "1,0", "-1,2", "1, 2", "a,b", "1000,1", "1,"})
    EXPECT_THROW(parse_depth(text, Geometry::kSchnell), UsageError) << text;
  for (const char* text : {"", "0", "1,2", "x"})
    EXPECT_THROW(parse_depth(text, Geometry::kT5Xxl), UsageError) << text;
  EXPECT_EQ(parse_geometry("t5-xxl"), Geometry::kT5Xxl);
  EXPECT_THROW(parse_geometry("Dev"), UsageError);
}

TEST(Geometry, FlagsThatDoNotGoTogetherAreRefused) {
  EXPECT_THROW(check(TinyOptions{.out = "x", .depth = "1,1"}), UsageError);
  EXPECT_THROW(check(TinyOptions{.out = "x", .geometry = Geometry::kDev, .depth = "1"}),
               UsageError);
  EXPECT_THROW(check(TinyOptions{.out = "x", .t5_tokenizer = "t", .geometry = Geometry::kT5Xxl}),
               UsageError);
  EXPECT_NO_THROW(check(TinyOptions{.out = "x", .geometry = Geometry::kDev, .depth = "1,1"}));
}

}  // namespace
}  // namespace flux::model
