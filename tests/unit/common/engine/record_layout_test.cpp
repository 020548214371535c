#include "common/engine/record_layout.h"
#include "common/engine/model_file.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "common/models/flux/names.h"
#include "tests/support/tiny_flux.h"

namespace flux::engine {
namespace {

TEST(RecordLayout, PlacesSlicesApartAndViewsThem) {
  RecordLayout layout;
  layout.add("a", {3, 5}, at::kBFloat16);
  layout.add("b", {}, at::kFloat);
  layout.add("c", {0, 4}, at::kFloat);
  layout.add("d", {130}, at::kFloat8_e4m3fn);
  EXPECT_EQ(layout.bytes(), 4096);
  int64_t end = 0;
  for (const Slice& slice : layout.slices()) {
    EXPECT_EQ(slice.offset % kSliceAlignment, 0);
    EXPECT_GE(slice.offset, end);
    end = slice.end();
  }
  const auto record = at::zeros({layout.bytes()}, at::kByte);
  layout.view(record, "a").fill_(1.5);
  layout.view(record, "b").fill_(-2);
  EXPECT_EQ(layout.view(record, "a").sizes(), (at::IntArrayRef{3, 5}));
  EXPECT_EQ(layout.view(record, "a").sum().item<float>(), 22.5f);
  EXPECT_EQ(layout.view(record, "b").item<float>(), -2);
  EXPECT_EQ(layout.view(record, "c").numel(), 0);
  EXPECT_EQ(layout.view(record, "d").scalar_type(), at::kFloat8_e4m3fn);
  EXPECT_EQ(layout.view(record, "a").data_ptr(), record.data_ptr());
  EXPECT_THROW(layout.add("a", {1}, at::kFloat), std::invalid_argument);
  EXPECT_THROW(layout.add("e", {-1}, at::kFloat), std::invalid_argument);
  EXPECT_THROW(layout.view(record, "e"), std::invalid_argument);
  EXPECT_THROW(layout.view(at::zeros({4095}, at::kByte), 0), std::invalid_argument);
  EXPECT_THROW(layout.view(at::zeros({4096}, at::kFloat), 0), std::invalid_argument);
}

TEST(RecordLayout, AStepOnOneSliceLeavesTheGraphOfAnotherAlone) {
  RecordLayout layout;
  layout.add("a", {4}, at::kFloat);
  layout.add("b", {4}, at::kFloat);
  const auto record = at::ones({layout.bytes() / 4}, at::kFloat).view(at::kByte);
  const auto a = layout.view(record, "a").requires_grad_(), b = layout.view(record, "b");
  const auto loss = (a * b).sum();
  layout.view(record, "a").detach().add_(1);  // another view of the same bytes
  EXPECT_NO_THROW(loss.backward());
  EXPECT_TRUE(at::equal(a.grad(), at::ones({4})));
}

TEST(RecordLayout, HasTheSameFormOnMeta) {
  const auto layout = block_layout(test::tiny_flux_config(), 1, at::kBFloat16);
  const auto record = at::empty({layout.bytes()}, at::TensorOptions(at::kByte).device(at::kMeta));
  const auto view = layout.view(record, "linear1.weight");
  EXPECT_TRUE(view.is_meta());
  EXPECT_EQ(view.sizes(), (at::IntArrayRef{3 * 128 + 512, 128}));
  EXPECT_EQ(view.scalar_type(), at::kBFloat16);
}

TEST(BlockLayout, HoldsEveryTensorOfTheBlocksOnce) {
  dit::Config config = test::tiny_flux_config();
  config.num_double_blocks = 12;  // "double_blocks.1." begins no name of block 10
  config.num_single_blocks = 2;
  size_t in_blocks = 0;
  for (const auto& [name, shape] : dit::tensor_shapes(config))
    in_blocks += name.starts_with("double_blocks.") || name.starts_with("single_blocks.");
  size_t found = 0;
  for (int64_t i = 0; i < 14; ++i) {
    const auto layout = block_layout(config, i, at::kFloat);
    found += layout.slices().size();
    for (const Slice& slice : layout.slices()) EXPECT_EQ(slice.dtype, at::kFloat) << slice.name;
  }
  EXPECT_EQ(found, in_blocks);
  EXPECT_EQ(block_prefix(config, 11), "double_blocks.11.");
  EXPECT_EQ(block_prefix(config, 12), "single_blocks.0.");
  EXPECT_THROW(block_prefix(config, 14), std::invalid_argument);
  EXPECT_THROW(block_prefix(config, -1), std::invalid_argument);
}

TEST(BlockLayout, OfFluxHasTheBytesOfItsParameters) {
  const dit::Config config;
  EXPECT_EQ(block_layout(config, 0, at::kBFloat16).bytes() / 4096, 2 * 339'831'296 / 4096 + 1);
  EXPECT_EQ(block_layout(config, 56, at::kBFloat16).bytes() / 4096, 2 * 141'591'808 / 4096 + 1);
}

TEST(BlockLayout, QuantisedHasCodesAndScalesOfMatricesOnly) {
  const auto config = test::tiny_flux_config();
  const auto layout = block_layout(config, 0, at::kBFloat16, QuantFormat::kFp8);
  const auto& codes = layout.slices()[*layout.find("img_attn.qkv.weight")];
  const auto& scales = layout.slices()[*layout.find("img_attn.qkv.weight_scale")];
  EXPECT_EQ(codes.dtype, at::kFloat8_e4m3fn);
  EXPECT_EQ(codes.shape, (std::vector<int64_t>{384, 128}));
  EXPECT_EQ(scales.dtype, at::kFloat);
  EXPECT_EQ(scales.shape, (std::vector<int64_t>{384, 2}));
  EXPECT_EQ(layout.slices()[*layout.find("img_attn.qkv.bias")].dtype, at::kBFloat16);
  EXPECT_FALSE(layout.find("img_attn.qkv.bias_scale"));
  const auto nf4 = block_layout(config, 1, at::kBFloat16, QuantFormat::kNf4);
  EXPECT_EQ(nf4.slices()[*nf4.find("linear1.weight")].shape, (std::vector<int64_t>{896, 64}));
}

}  // namespace
}  // namespace flux::engine
