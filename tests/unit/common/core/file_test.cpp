#include "common/core/file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/core/error.h"
#include "common/core/lost_file.h"
#include "tests/support/temporary_folder.h"

namespace flux {
namespace {

namespace fs = std::filesystem;

size_t num_entries(const fs::path& folder) {
  return static_cast<size_t>(
      std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

TEST(AtomicFile, LeavesNothingWithoutCommit) {
  const test::TemporaryFolder folder;
  {
    AtomicFile file(folder / "a");
    file.write("half");
  }
  EXPECT_EQ(num_entries(folder.path()), 0u);
}

TEST(AtomicFile, KeepsTheOldFileUntilCommit) {
  const test::TemporaryFolder folder;
  folder.write("a", "old");
  {
    AtomicFile file(folder / "a");
    file.write("newer");
    EXPECT_EQ(read_file(folder / "a"), "old");
    file.write_at(0, std::as_bytes(std::span("N", 1)));
    file.commit();
  }
  EXPECT_EQ(read_file(folder / "a"), "Newer");
  EXPECT_EQ(num_entries(folder.path()), 1u);
}

TEST(AtomicFile, NamesTheFolderItCannotWriteTo) {
  const test::TemporaryFolder folder;
  try {
    write_file_atomic(folder / "absent/a", "x");
    FAIL();
  } catch (const ResourceError& error) {
    EXPECT_NE(std::string(error.what()).find("absent/a: cannot be created: No such file"),
              std::string::npos)
        << error.what();
  }
}

TEST(WriteFileIfChanged, KeepsTheTimeOfAnEqualFile) {
  const test::TemporaryFolder folder;
  const fs::path path = folder.write("a", "same");
  const auto old = fs::last_write_time(path) - std::chrono::hours(1);
  fs::last_write_time(path, old);
  EXPECT_FALSE(write_file_if_changed(path, "same"));
  EXPECT_EQ(fs::last_write_time(path), old);
  EXPECT_TRUE(write_file_if_changed(path, "other"));
  EXPECT_EQ(read_file(path), "other");
}

TEST(ReadFile, RefusesWhatIsNoFile) {
  const test::TemporaryFolder folder;
  EXPECT_THROW(read_file(folder.path()), InputError);
  EXPECT_THROW(read_file(folder / "absent"), InputError);
  ASSERT_EQ(mkfifo((folder / "fifo").c_str(), 0600), 0);
  EXPECT_THROW(read_file(folder / "fifo"), InputError);  // and does not wait for a writer
  EXPECT_THROW(read_file(folder.write("big", "12345"), 4), InputError);
  for (const auto& path : {folder.path(), folder / "absent", folder / "fifo", folder / "big/x"}) {
    try {
      read_file(path);
      FAIL() << path;
    } catch (const InputError& error) {
      EXPECT_NE(std::string(error.what()).find("\n  hint: "), std::string::npos) << error.what();
    }
  }
}

TEST(MappedFile, ShowsTheBytesAndTakesAnEmptyFile) {
  const test::TemporaryFolder folder;
  const MappedFile file(folder.write("a", "abc"));
  EXPECT_EQ(file.bytes().size(), 3u);
  EXPECT_EQ(file.bytes()[2], std::byte{'c'});
  EXPECT_TRUE(MappedFile(folder.write("empty", "")).bytes().empty());
}

TEST(MappedFile, ThatIsCutOffEndsTheProcessWithItsName) {
  const test::TemporaryFolder folder;
  const auto path = folder.write("weights", std::string(1 << 20, 'x'));
  const auto read_lost = [&] {
    report_lost_mappings("flux-x");
    const MappedFile file(path);
    const MappedFile another(folder.write("another", "abc"));
    fs::resize_file(path, 0);
    _exit(static_cast<int>(file.bytes()[500'000]));
  };
  EXPECT_EXIT(
      read_lost(),
      testing::ExitedWithCode(5),
      "flux-x: error: .*/weights: reading failed: .*\n  hint: check the file and run again");
}

TEST(PeakRss, IsPlausible) { EXPECT_GT(peak_rss_bytes(), uint64_t{1} << 20); }

}  // namespace
}  // namespace flux
