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

TEST(ChooseGpu, GivesEachProcessOfAMachineItsOwn) {
  EXPECT_EQ(choose_gpu({}, 1), 0);
  EXPECT_EQ(choose_gpu({}, 8), 0);
  for (int64_t number = 0; number < 4; ++number) {
    EXPECT_EQ(choose_gpu({.number = number, .num = 4}, 4), number);
    EXPECT_EQ(choose_gpu({.number = number, .num = 4}, 8), number);
    // all of them say it, so that none waits for the others
    try {
      choose_gpu({.number = number, .num = 4}, 3);
      FAIL() << "a GPU for two";
    } catch (const ResourceError& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr("4 processes on this machine"));
      EXPECT_THAT(error.what(), testing::HasSubstr("3 GPUs for them"));
      EXPECT_THAT(error.what(), testing::HasSubstr("hint: "));
    }
  }
  // a launcher that says no number of processes
  EXPECT_THROW(choose_gpu({.number = 2, .num = 1}, 2), ResourceError);
}

TEST(DeviceChoices, AreTheWordsOfTheFlag) {
  ASSERT_EQ(device_choices().size(), 3u);
  EXPECT_EQ(device_choices()[0].first, "auto");  // the default
}

TEST(Version, NamesLibTorch) { EXPECT_THAT(version_text("x"), testing::HasSubstr("LibTorch 2.")); }

}  // namespace
}  // namespace flux
