#include "common/tensor/device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/core/error.h"
#include "common/core/tool.h"

namespace flux {
namespace {

TEST(ResolveDevice, CpuIsCpu) { EXPECT_TRUE(resolve_device(DeviceChoice::kCpu).is_cpu()); }

TEST(ResolveDevice, CudaIsThereOrSaysWhatIsMissing) {
  const auto automatic = resolve_device(DeviceChoice::kAuto);
  try {
    EXPECT_TRUE(resolve_device(DeviceChoice::kCuda).is_cuda());
    EXPECT_TRUE(automatic.is_cuda());
  } catch (const ResourceError& error) {
    EXPECT_TRUE(automatic.is_cpu());
    EXPECT_THAT(error.what(), testing::HasSubstr("--device cuda: "));
    EXPECT_THAT(error.what(), testing::HasSubstr("hint: "));
  }
}

TEST(DeviceChoices, AreTheWordsOfTheFlag) {
  ASSERT_EQ(device_choices().size(), 3u);
  EXPECT_EQ(device_choices()[0].first, "auto");  // the default
}

TEST(Version, NamesLibTorch) { EXPECT_THAT(version_text("x"), testing::HasSubstr("LibTorch 2.")); }

}  // namespace
}  // namespace flux
