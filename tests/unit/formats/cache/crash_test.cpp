// Killed writers, failing writes, two writers: nothing finished is lost, nothing published is bad.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/rng.h"
#include "formats/cache/reader.h"
#include "formats/cache/segment_reader.h"
#include "formats/cache/segment_writer.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;

struct Child {
  pid_t pid;
  int from;  // reads what the child writes
};

// Runs `body` in a process of its own, which ends with its result.
Child start(const std::function<int(int to)>& body) {
  int ends[2];
  EXPECT_EQ(pipe(ends), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    close(ends[0]);
    int result = 99;
    try {
      result = body(ends[1]);
    } catch (const Error& error) {
      result = static_cast<int>(error.exit_code());
    } catch (...) {
    }
    _exit(result);
  }
  close(ends[1]);
  return {pid, ends[0]};
}

std::string drain(int fd) {
  std::string all;
  char buffer[4096];
  for (ssize_t got; (got = read(fd, buffer, sizeof buffer)) > 0;)
    all.append(buffer, static_cast<size_t>(got));
  close(fd);
  return all;
}

int wait_for(pid_t pid) {
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFSIGNALED(status) ? 256 + WTERMSIG(status) : WEXITSTATUS(status);
}

// Adds what is missing of the samples 0 to `end` - 1, a byte to `to` for each finished one, and
// publishes now and then.
int fill(const fs::path& folder, const Recipe& recipe, uint64_t end, int to) {
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  Writer writer(folder, recipe, test::provenance());
  std::vector<WantedItem> items;
  for (uint64_t i = 0; i < end; ++i) {
    const auto data = test::sample(layout, i);
    if (!writer.contains(data.info.key)) {
      writer.add(data.info, data.spans());
      if (write(to, "+", 1) != 1) return 98;
    }
    items.push_back(test::wanted(data, i));
    if (i % 70 == 69) writer.publish(test::publication(items));
  }
  writer.publish(test::publication(items));
  return 0;
}

void expect_whole(const fs::path& folder, Kind kind, uint64_t end) {
  const Cache cache(folder, kind);
  ASSERT_EQ(cache.index().num_items(), static_cast<int64_t>(end));
  for (uint64_t i = 0; i < end; ++i) {
    const auto expected = test::sample(cache.layout(), i);
    const auto& variant = cache.index().variants(static_cast<int64_t>(i))[0];
    ASSERT_EQ(variant.key, expected.info.key) << i;
    ASSERT_EQ(cache.read(variant).tensors, expected.tensors) << i;
  }
}

// Every file under a published name can be opened and read whole.
void expect_published_segments_good(const fs::path& folder) {
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (!is_segment_name(entry.path().filename().native())) continue;
    const Segment segment(entry.path());
    for (int64_t i = 0; i < segment.num_samples(); ++i) segment.read(i);
  }
}

TEST(KilledWriter, LosesNoFinishedSample) {
  constexpr uint64_t kSamples = 600;
  for (const Kind kind : {Kind::kLatents, Kind::kText}) {
    const Recipe recipe = test::recipe(kind);
    const test::TemporaryFolder folder;
    const RandomStream random(3, Purpose::kShuffle, static_cast<uint64_t>(kind));
    size_t finished = 0;
    for (uint64_t kill_number = 0; kill_number < 20; ++kill_number) {
      SCOPED_TRACE(testing::Message() << kind_name(kind) << ", kill " << kill_number);
      const Child child = start([&](int to) { return fill(folder.path(), recipe, kSamples, to); });
      usleep(static_cast<useconds_t>(random.below(kill_number, 25'000)));
      kill(child.pid, SIGKILL);
      wait_for(child.pid);
      finished += drain(child.from).size();
      ASSERT_NO_THROW(expect_published_segments_good(folder.path()));
      // what the dead writer reported is there for the next one
      const Child counter = start([&](int to) {
        const Writer writer(folder.path(), recipe, test::provenance());
        const Layout layout = layout_of(kind, recipe.parameters);
        for (uint64_t i = 0; i < kSamples && writer.contains(test::sample(layout, i).info.key);
             ++i) {
          if (write(to, "+", 1) != 1) return 98;
        }
        return 0;
      });
      const size_t there = drain(counter.from).size();
      ASSERT_EQ(wait_for(counter.pid), 0);
      ASSERT_GE(there, finished);
      finished = there;  // one may be finished and not reported yet
    }
    const Child child = start([&](int to) { return fill(folder.path(), recipe, kSamples, to); });
    EXPECT_EQ(drain(child.from).size(), kSamples - finished) << "something was encoded twice";
    ASSERT_EQ(wait_for(child.pid), 0);
    expect_whole(folder.path(), kind, kSamples);
  }
}

TEST(FailingWrite, IsAResourceErrorAndTheNextRunGoesOn) {
  // RLIMIT_FSIZE makes the write that passes it fail with EFBIG: in the journal, a segment, the
  // index or the manifest
  constexpr uint64_t kSamples = 200;
  const Recipe recipe = test::recipe(Kind::kText);
  const test::TemporaryFolder folder;
  size_t finished = 0;
  int failures = 0;
  for (rlim_t limit = 64; limit < (1u << 20); limit = limit * 3 / 2) {
    SCOPED_TRACE(testing::Message() << "limit " << limit);
    const Child child = start([&](int to) {
      signal(SIGXFSZ, SIG_IGN);
      const rlimit bytes{limit, limit};
      setrlimit(RLIMIT_FSIZE, &bytes);
      return fill(folder.path(), recipe, kSamples, to);
    });
    finished += drain(child.from).size();
    const int result = wait_for(child.pid);
    ASSERT_NO_THROW(expect_published_segments_good(folder.path()));
    if (result == 0) break;
    ++failures;
    ASSERT_EQ(result, 5);
  }
  EXPECT_GE(failures, 8);
  EXPECT_EQ(finished, kSamples) << "something was encoded twice or not at all";
  expect_whole(folder.path(), Kind::kText, kSamples);
  for (const auto& entry : fs::directory_iterator(folder.path())) {
    EXPECT_FALSE(entry.path().filename().native().starts_with(".")) << entry.path();
  }
}

TEST(UnwritableFolder, IsAResourceError) {
  const test::TemporaryFolder folder;
  const auto file = folder.write("file", "not a folder");
  EXPECT_THROW(Writer(file, test::recipe(Kind::kText), test::provenance()), ResourceError);
  EXPECT_THROW(Writer(file / "below", test::recipe(Kind::kText), test::provenance()),
               ResourceError);
  EXPECT_THROW(Writer("/proc/cache", test::recipe(Kind::kText), test::provenance()), ResourceError);
}

TEST(WriterLock, OfADeadProcessIsTakenOverByExactlyOne) {
  const Recipe recipe = test::recipe(Kind::kText);
  for (int round = 0; round < 5; ++round) {
    const test::TemporaryFolder folder;
    const Child dead = start([&](int) {
      const Writer writer(folder.path(), recipe, test::provenance());
      raise(SIGKILL);
      return 0;
    });
    ASSERT_EQ(wait_for(dead.pid), 256 + SIGKILL);
    close(dead.from);
    ASSERT_TRUE(fs::exists(folder.path() / ".writer.lock"));

    int gate[2];
    ASSERT_EQ(pipe(gate), 0);
    std::vector<Child> children;
    for (int i = 0; i < 8; ++i) {
      children.push_back(start([&](int) {
        close(gate[1]);
        char byte;
        (void)!read(gate[0], &byte, 1);  // all go when the gate is closed
        const Writer writer(folder.path(), recipe, test::provenance());
        usleep(300'000);
        return 0;
      }));
    }
    close(gate[0]);
    close(gate[1]);
    int owners = 0;
    for (const Child& child : children) {
      const int result = wait_for(child.pid);
      close(child.from);
      owners += result == 0;
      EXPECT_THAT(result, testing::AnyOf(0, 4));
    }
    EXPECT_EQ(owners, 1);
    EXPECT_FALSE(fs::exists(folder.path() / ".writer.lock"));
  }
}

TEST(WriterLock, OfALivingProcessSaysNothingInACopyOfItsFolder) {
  const test::TemporaryFolder folder;
  const auto from = folder.path() / "from", to = folder.path() / "to";
  const Writer writer(from, test::recipe(Kind::kText), test::provenance());
  fs::copy(from, to, fs::copy_options::recursive);
  ASSERT_TRUE(fs::exists(to / ".writer.lock"));
  EXPECT_NO_THROW(Writer(to, test::recipe(Kind::kText), test::provenance()));
  EXPECT_THROW(Writer(from, test::recipe(Kind::kText), test::provenance()), CacheError);
  fs::rename(from, folder.path() / "renamed");
  EXPECT_THROW(Writer(folder.path() / "renamed", test::recipe(Kind::kText), test::provenance()),
               CacheError);
}

TEST(WriterLock, OfAnotherHostIsRespected) {
  const test::TemporaryFolder folder;
  folder.write(
      ".writer.lock",
      R"({"host":"elsewhere x","boot":"b","namespace":"n","pid":1,"started":"1","id":"i"})");
  try {
    const Writer writer(folder.path(), test::recipe(Kind::kText), test::provenance());
    FAIL() << "it was taken over";
  } catch (const CacheError& error) {
    EXPECT_THAT(error.what(),
                testing::AllOf(testing::HasSubstr("process 1 on elsewhere"),
                               testing::HasSubstr(".writer.lock")));
  }
}

TEST(WriterLock, OfTheSameSlurmJobBeforeItWasQueuedAgainIsOver) {
  setenv("SLURM_JOB_ID", "77", 1);
  setenv("SLURM_CLUSTER_NAME", "big", 1);
  setenv("SLURM_RESTART_COUNT", "2", 1);
  const auto is_taken_over = [](const std::string& job, int restarts) {
    const test::TemporaryFolder folder;
    folder.write(
        ".writer.lock",
        R"({"host":"elsewhere x","boot":"b","namespace":"n","pid":1,"started":"1","id":"i","job":")" +
            job + R"(","restarts":)" + std::to_string(restarts) + "}");
    try {
      const Writer writer(folder.path(), test::recipe(Kind::kText), test::provenance());
      return true;
    } catch (const CacheError&) {
      return false;
    }
  };
  EXPECT_TRUE(is_taken_over("big 77", 0));
  EXPECT_TRUE(is_taken_over("big 77", 1));
  EXPECT_FALSE(is_taken_over("big 77", 2)) << "another step of the job is at work";
  EXPECT_FALSE(is_taken_over("big 78", 0));
  EXPECT_FALSE(is_taken_over("small 77", 0));
  {
    const test::TemporaryFolder folder;
    const Writer writer(folder.path(), test::recipe(Kind::kText), test::provenance());
    EXPECT_THAT(read_file(folder / ".writer.lock"),
                testing::AllOf(testing::HasSubstr(R"("job":"big 77")"),
                               testing::HasSubstr(R"("restarts":2)")));
  }
  unsetenv("SLURM_JOB_ID");
  EXPECT_FALSE(is_taken_over("big 77", 0)) << "no job";
  unsetenv("SLURM_CLUSTER_NAME");
  unsetenv("SLURM_RESTART_COUNT");
}

}  // namespace
}  // namespace flux::cache
