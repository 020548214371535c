#include "common/engine/block_inputs.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/rand.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <stdexcept>

#include "common/tensor/memory.h"

namespace flux::engine {
namespace {

TEST(BlockInputs, GiveTheSameBitsFromEveryPlace) {
  const auto folder = std::filesystem::temp_directory_path();
  for (const auto place : {InputPlace::kDevice, InputPlace::kHost, InputPlace::kDisk}) {
    BlockInputs inputs(place, folder);
    for (int round = 0; round < 2; ++round) {
      std::vector<at::Tensor> kept;
      for (int64_t block = 0; block < 5; ++block) {
        kept.push_back(at::rand({2, 3 + block, 7}).to(block % 2 ? at::kBFloat16 : at::kFloat));
        // a view is kept as what it shows
        inputs.keep(block, 1, {kept.back(), kept.back().narrow(1, 1, 2)});
      }
      for (int64_t block = 4; block >= 0; --block) {
        const auto taken = inputs.take(block, 1);
        ASSERT_EQ(taken.size(), 2u);
        const auto& expected = kept[static_cast<size_t>(block)];
        EXPECT_TRUE(at::equal(taken[0], expected));
        EXPECT_TRUE(at::equal(taken[1], expected.narrow(1, 1, 2)));
      }
      EXPECT_THROW(inputs.take(0, 1), std::out_of_range);
    }
  }
}

TEST(BlockInputs, OnDiskTheyAreNotInMemory) {
  count_tensor_memory();
  BlockInputs inputs(InputPlace::kDisk, std::filesystem::temp_directory_path());
  const auto before = cpu_memory().live;
  inputs.keep(0, 0, {at::rand({1 << 18})});
  EXPECT_EQ(cpu_memory().live, before);
  EXPECT_EQ(inputs.take(0, 0)[0].numel(), 1 << 18);
}

TEST(BlockInputs, APlanForgetsWhatLeavesTheDevice) {
  count_tensor_memory();
  const auto options = at::TensorOptions().device(at::kMeta);
  for (const auto place : {InputPlace::kHost, InputPlace::kDisk}) {
    BlockInputs inputs(place, std::filesystem::temp_directory_path());
    const auto before = meta_memory().live;
    inputs.keep(0, 0, {at::rand({1000}, options)});
    EXPECT_EQ(meta_memory().live, before);
    EXPECT_EQ(inputs.take(0, 0)[0].numel(), 1000);
  }
}

}  // namespace
}  // namespace flux::engine
