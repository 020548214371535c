// flux-cache verify, repair, merge, gc and copy: what they say, and with which exit code.
#include "pipelines/cache/maintain.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "formats/cache/files.h"
#include "pipelines/cache/diff.h"
#include "pipelines/cache/stats.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/unprivileged.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

// Changes one byte in the frames of the first segment.
std::string damage(const fs::path& folder) {
  const std::string name = read_manifest(folder).segments.at(0).name;
  std::fstream file(folder / name, std::ios::in | std::ios::out | std::ios::binary);
  const auto at = static_cast<std::streamoff>(fs::file_size(folder / name) / 2);
  file.seekg(at);
  const char byte = static_cast<char>(file.get() ^ 0x20);
  file.seekp(at);
  file.put(byte);
  return name;
}

void expect_printable(const Report& report) {
  for (const char c : report.text)
    EXPECT_TRUE(c == '\n' || static_cast<unsigned char>(c) >= 32) << report.text;
  EXPECT_EQ(report.json.dump().find('\n'), std::string::npos);
}

TEST(Verify, TellsAGoodCacheFromADamagedOne) {
  const test::TemporaryFolder folder;
  for (const bool deep : {false, true}) {
    SCOPED_TRACE(deep);
    const auto cache = folder / (deep ? "deep" : "plain");
    test::make_cache(cache, test::recipe(Kind::kLatents), 0, 20);
    const VerifyOptions options{{cache.native()}, deep};
    const Report good = verify(options);
    EXPECT_EQ(good.exit_code, ExitCode::kOk) << good.text;
    EXPECT_EQ(good.json["ok"], true);
    const std::string name = damage(cache);
    const Report bad = verify(options);
    EXPECT_EQ(bad.exit_code, ExitCode::kDiffers);
    EXPECT_EQ(bad.json["ok"], false);
    ASSERT_GE(bad.json["findings"].size(), 1u);
    EXPECT_EQ(bad.json["findings"][0]["file"], name);
    EXPECT_EQ(bad.json["num_findings"], bad.json["findings"].size());
    EXPECT_THAT(bad.text, HasSubstr(name));
    expect_printable(bad);
  }
  EXPECT_THROW(verify({{(folder / "absent").native()}, false}), CacheError);
}

// Neither verify nor what reads takes them for damaged.
TEST(Unreadable, FilesAreNamedWithTheirPermissions) {
  const test::TemporaryFolder folder;
  const auto cache = folder / "cache", other = folder / "other";
  for (const auto& made : {cache, other}) test::make_cache(made, test::recipe(Kind::kText), 0, 3);
  for (const std::string& name : {std::string(kManifestName),
                                  std::string(kIndexName),
                                  read_manifest(cache).segments.at(0).name}) {
    SCOPED_TRACE(name);
    fs::permissions(cache / name, fs::perms::none);
    {
      const test::Unprivileged user(folder.path());
      const std::vector<std::function<void()>> all = {
          [&] {
            verify({{cache.native()}, false});
          },
          [&] { stats(look_into(cache, false)); },
          [&] { diff(look_into(cache, false), look_into(other, false)); },
          [&] { diff(look_into(other, false), look_into(cache, false)); }};
      for (const auto& read : all) {
        try {
          read();
          ADD_FAILURE() << "nothing was refused";
        } catch (const CacheError& error) {
          EXPECT_THAT(error.what(), HasSubstr(name + ": cannot be read: Permission denied"));
          EXPECT_THAT(error.what(), HasSubstr("hint: check "));
          EXPECT_THAT(error.what(), HasSubstr("permissions"));
        }
      }
    }
    fs::permissions(cache / name, fs::perms::owner_read | fs::perms::owner_write);
  }
}

TEST(Repair, ListsWhatIsLost) {
  const test::TemporaryFolder folder;
  const auto cache = folder / "cache";
  test::make_cache(cache, test::recipe(Kind::kText), 0, 20);
  const Report untouched = repair({{cache.native()}});
  EXPECT_EQ(untouched.json["changed"], false);
  EXPECT_EQ(untouched.json["complete"], true);
  EXPECT_EQ(untouched.json["num_samples"], 20);
  damage(cache);
  const Report report = repair({{cache.native()}});
  expect_printable(report);
  EXPECT_EQ(report.json["changed"], true);
  const auto lost = report.json["lost"].size();
  ASSERT_GE(lost, 1u);
  EXPECT_EQ(report.json["num_samples"], 20 - lost);
  EXPECT_FALSE(report.json["lost"][0]["reason"].get<std::string>().empty());
  EXPECT_EQ(report.json["complete"], false);
  EXPECT_FALSE(fs::exists(cache / kManifestName));
  test::make_cache(cache, test::recipe(Kind::kText), 0, 20);  // encodes what is lost
  EXPECT_EQ(verify({{cache.native()}, true}).exit_code, ExitCode::kOk);
}

TEST(Copy, GivesAnEqualCache) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "cache", test::recipe(Kind::kLatents), 0, 140);
  CopyOptions options{{(folder / "cache").native()}, folder / "copy", true};
  check(options);
  const Report report = copy(options);
  expect_printable(report);
  EXPECT_EQ(report.json["num_samples"], 140);
  EXPECT_EQ(report.json["copied"], 2);
  EXPECT_TRUE(diff(look_into(folder / "cache", false), look_into(folder / "copy", false)).equal());
  EXPECT_EQ(copy(options).json["changed"], false);
  options = {{(folder / "cache").native(), (folder / "other").native()}, {}, false};
  check(options);
  copy(options);
  EXPECT_TRUE(fs::exists(folder / "other" / kManifestName));
}

TEST(Gc, RemovesWhatNoItemWants) {
  const test::TemporaryFolder folder;
  const auto cache = folder / "cache";
  test::make_cache(cache, test::recipe(Kind::kLatents), 0, 10);
  test::make_cache(cache, test::recipe(Kind::kLatents), 7, 12);
  const Report dry = gc({{cache.native()}, true});
  EXPECT_EQ(dry.json["removed_samples"], 7);
  EXPECT_EQ(look_into(cache, false).num_unwanted, 7);
  const Report report = gc({{cache.native()}, false});
  expect_printable(report);
  EXPECT_EQ(report.json["removed_samples"], 7);
  EXPECT_EQ(report.json["kept_samples"], 5);
  EXPECT_EQ(look_into(cache, false).num_unwanted, 0);
  EXPECT_EQ(verify({{cache.native()}, true}).exit_code, ExitCode::kOk);
}

TEST(Maintain, SaysThatAFileIsNoFolder) {
  const test::TemporaryFolder folder;
  const std::string file = folder.write("file", "x").native();
  const auto says = [](const std::function<void()>& body) -> std::string {
    try {
      body();
    } catch (const CacheError& error) {
      return error.what();
    }
    return "accepted";
  };
  for (const auto& text : {says([&] {
                             verify({{file}, false});
                           }),
                           says([&] { repair({{file}}); }),
                           says([&] {
                             gc({{file}, false});
                           }),
                           says([&] {
                             copy({{file}, folder / "out", false});
                           }),
                           says([&] { look_into(file, false); })}) {
    EXPECT_THAT(text, HasSubstr(file + ": is a file, not the folder of a cache\n  hint: "));
  }
  for (const auto& text : {says([&] {
                             verify({{file + "2"}, false});
                           }),
                           says([&] { repair({{file + "2"}}); }),
                           says([&] {
                             gc({{file + "2"}, false});
                           })}) {
    EXPECT_THAT(text, HasSubstr(file + "2: there is no such folder\n  hint: "));
  }
}

TEST(Maintain, CountsOneAndMany) {
  const test::TemporaryFolder folder;
  const auto cache = folder / "cache";
  test::make_cache(cache, test::recipe(Kind::kText), 0, 1);
  EXPECT_THAT(repair({{cache.native()}}).text, HasSubstr(": 1 sample good"));
  EXPECT_THAT(gc({{cache.native()}, false}).text, HasSubstr(": 1 sample kept"));
  EXPECT_THAT(copy({{cache.native()}, folder / "copy", false}).text, HasSubstr(": 1 sample, "));
  fs::remove(cache / kIndexName);
  const Report found = verify({{cache.native()}, false});
  EXPECT_EQ(found.json["num_findings"], 1) << found.text;
  EXPECT_THAT(found.text, HasSubstr(": 1 finding;"));
  const Report mended = repair({{cache.native()}});
  EXPECT_THAT(mended.text, HasSubstr("index.h5: "));
  EXPECT_THAT(mended.json["unreadable"].get<std::string>(), HasSubstr("index.h5: "));
}

TEST(Maintain, StopsOnASignal) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "cache", test::recipe(Kind::kText), 0, 20);
  cancel::set(ExitCode::kInterrupt);
  EXPECT_THROW(verify({{(folder / "cache").native()}, true}), Interrupted);
  EXPECT_THROW(copy({{(folder / "cache").native()}, folder / "copy", false}), Interrupted);
  EXPECT_THROW(gc({{(folder / "cache").native()}, false}), Interrupted);
  EXPECT_THROW(repair({{(folder / "cache").native()}}), Interrupted);
  cancel::set(std::nullopt);
  EXPECT_FALSE(fs::exists(folder / "copy" / kManifestName));
}

TEST(Maintain, WantsTheRightNumberOfFolders) {
  EXPECT_THROW(check(VerifyOptions{}), UsageError);
  EXPECT_THROW(check(RepairOptions{{"a", "b"}}), UsageError);
  EXPECT_THROW(check(GcOptions{{"a", "b"}, false}), UsageError);
  EXPECT_THROW(check(MergeOptions{{}, "out", false}), UsageError);
  EXPECT_THROW(check(MergeOptions{{"a"}, {}, false}), UsageError);
  EXPECT_THROW(check(CopyOptions{{"a"}, {}, false}), UsageError);
  EXPECT_THROW(check(CopyOptions{{"a", "b"}, "c", false}), UsageError);
}

}  // namespace
}  // namespace flux::cache
