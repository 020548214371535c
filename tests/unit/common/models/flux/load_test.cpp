#include "common/models/flux/load.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/models/flux/transformer.h"
#include "common/tensor/tensor.h"
#include "tests/support/flux_cases.h"
#include "tests/support/golden.h"
#include "tests/support/shared_data.h"

namespace flux::dit {
namespace {

using testing::HasSubstr;

NetTensors golden_net(const char* file = "flux/weights_bfl.safetensors") {
  return take_net(read_weights(test::golden_models() / file), NetKind::kFlux);
}

/// The message of the InputError that `body` throws.
template <class Body>
std::string refusal(const Body& body) {
  try {
    body();
  } catch (const InputError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(ReadConfig, ReadsBothLayouts) {
  const auto bfl = read_config(golden_net());
  EXPECT_EQ(bfl.hidden, 128);
  EXPECT_EQ(bfl.num_heads, 1);
  EXPECT_EQ(bfl.mlp, 512);
  EXPECT_EQ(bfl.num_double_blocks, 2);
  EXPECT_EQ(bfl.num_single_blocks, 3);
  EXPECT_EQ(bfl.prompt_dim, 96);
  EXPECT_EQ(bfl.pooled_dim, 80);
  EXPECT_TRUE(bfl.guidance);
  EXPECT_EQ(bfl.axes, (std::array<int64_t, 3>{16, 56, 56}));
  auto diffusers = read_config(golden_net("flux/weights_diffusers.safetensors"));
  EXPECT_EQ(diffusers.num_double_blocks, 1);
  EXPECT_EQ(diffusers.num_single_blocks, 1);
  diffusers.num_double_blocks = bfl.num_double_blocks;
  diffusers.num_single_blocks = bfl.num_single_blocks;
  EXPECT_EQ(diffusers, bfl);
}

TEST(ReadConfig, NamesAMissingBlock) {
  auto net = golden_net();
  std::erase_if(net.tensors,
                [](const auto& entry) { return entry.first.starts_with("single_blocks.1."); });
  EXPECT_THAT(refusal([&] { read_config(net); }),
              HasSubstr("has single_blocks.2 but not single_blocks.1"));
}

TEST(CanonicalTensors, ListsWhatIsMissingAndSurplus) {
  auto net = golden_net();
  const auto config = read_config(net);
  net.tensors.erase("img_in.bias");
  net.tensors["stray.weight"] = at::zeros({1});
  const auto message = refusal([&] { canonical_tensors(net, config); });
  EXPECT_THAT(message, HasSubstr("img_in.bias"));
  EXPECT_THAT(message, HasSubstr("stray.weight"));
}

TEST(CanonicalTensors, AreTheSameFromBothLayouts) {
  const auto bfl = golden_net();
  const auto diffusers = golden_net("flux/weights_diffusers.safetensors");
  const auto joined = canonical_tensors(diffusers, read_config(diffusers));
  for (const auto& [name, tensor] : joined)
    EXPECT_TRUE(at::equal(tensor, bfl.tensors.at(name))) << name;
}

TEST(ToDiffusers, GivesTheReferencesBytes) {
  const auto net = golden_net();
  const auto config = read_config(net);
  const auto exported = to_diffusers(config, canonical_tensors(net, config));
  const auto layout =
      nlohmann::json::parse(std::ifstream(test::golden_models() / "flux/layout.json"));
  ASSERT_EQ(exported.size(), layout.size());
  for (const auto& entry : layout) {
    const auto name = entry.at("diffusers").get<std::string>();
    ASSERT_TRUE(exported.contains(name)) << name;
    const auto bytes = exported.at(name).contiguous();
    EXPECT_EQ(to_hex(sha256(host_bytes(bytes))), entry.at("sha256").get<std::string>()) << name;
  }
}

TEST(MakeWeights, NamedTensorsIsTheInverse) {
  const auto net = golden_net();
  const auto config = read_config(net);
  const auto canonical = canonical_tensors(net, config);
  const auto named = named_tensors(make_weights(config, canonical, at::kBFloat16));
  ASSERT_EQ(named.size(), canonical.size());
  for (const auto& [name, tensor] : named)
    EXPECT_TRUE(at::equal(tensor, canonical.at(name))) << name;
}

TEST(MakeWeights, KeepsTheFilesMemoryWhereNothingChanges) {
  const auto net = golden_net();
  const auto config = read_config(net);
  const auto weights = make_weights(config, net.tensors, at::kBFloat16);
  EXPECT_EQ(weights.double_blocks[0].img.qkv.weight.data_ptr(),
            net.tensors.at("double_blocks.0.img_attn.qkv.weight").data_ptr());
}

}  // namespace
}  // namespace flux::dit
