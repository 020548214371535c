#include "common/core/scratch_file.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "common/core/error.h"

namespace flux {
namespace {

std::filesystem::path new_folder() {
  std::string name = (std::filesystem::temp_directory_path() / "scratch_test.XXXXXX").string();
  EXPECT_NE(mkdtemp(name.data()), nullptr);
  return name;
}

TEST(ScratchFile, HoldsWhatWasWrittenAndLeavesNothing) {
  const auto folder = new_folder();
  {
    ScratchFile file(folder / "inner", "a test");
    file.reserve(1 << 20);
    std::vector<std::byte> bytes(100'000);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7);
    file.write(4096, bytes);
    file.write(3 << 20, bytes);  // beyond what was reserved
    for (const int64_t offset : {4096, 3 << 20}) {
      std::vector<std::byte> read(bytes.size());
      file.read(offset, read);
      EXPECT_EQ(read, bytes);
    }
    EXPECT_TRUE(std::filesystem::is_empty(folder / "inner"));
  }
  std::filesystem::remove_all(folder);
}

TEST(ScratchFile, ReadingBehindTheEndIsAnError) {
  const auto folder = new_folder();
  const ScratchFile file(folder, "a test");
  std::array<std::byte, 8> bytes{};
  EXPECT_THROW(file.read(0, bytes), ResourceError);
  std::filesystem::remove_all(folder);
}

TEST(ScratchFile, NamesTheBytesThatAreMissing) {
  const auto folder = new_folder();
  ScratchFile file(folder, "a test");
  try {
    file.reserve(int64_t{1} << 60);
    FAIL() << "there is no such disk";
  } catch (const ResourceError& error) {
    const std::string what = error.what();
    EXPECT_NE(what.find(folder.string()), std::string::npos) << what;
    EXPECT_NE(what.find("a test"), std::string::npos) << what;
    EXPECT_NE(what.find(std::to_string(int64_t{1} << 60) + " bytes"), std::string::npos) << what;
    EXPECT_NE(what.find("are free"), std::string::npos) << what;
    EXPECT_NE(what.find("--scratch"), std::string::npos) << what;
  }
  std::filesystem::remove_all(folder);
}

TEST(ScratchFile, GivesItsDescriptorAway) {
  const auto folder = new_folder();
  int descriptor = -1;
  {
    ScratchFile file(folder, "a test");
    descriptor = file.release();
  }
  EXPECT_EQ(write(descriptor, "x", 1), 1) << "it was closed";
  EXPECT_EQ(close(descriptor), 0);
  std::filesystem::remove_all(folder);
}

TEST(ScratchFile, AFolderThatCannotBeMadeIsAnError) {
  const auto folder = new_folder();
  EXPECT_THROW(ScratchFile("/proc/none", "a test"), ResourceError);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace flux
