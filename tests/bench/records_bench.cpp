// tests/bench/records_bench.cpp - how fast the blocks of a model file come through a ring, forward
// and back, when nothing is computed: what a step waits for the disk at least.
//
//   flux-model tiny --geometry dev --out F     (23.8 GB; --depth 7,14 makes one of 9 GB)
//   records_bench FILE cached|dropped|direct [PASSES=2] [THREADS=2] [LOOKAHEAD=1]
//
// The same for a scratch file in FOLDER, of records as large as a double block and its 8-bit states
// (1.36 GB each), which are changed and written back on the way back:
//
//   records_bench FOLDER cached|dropped|direct [PASSES=2] [THREADS=2] [LOOKAHEAD=1] [RECORDS=12]
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <numeric>
#include <string_view>

#include "common/core/file.h"
#include "common/engine/file_arena.h"
#include "common/engine/model_file.h"
#include "common/engine/ring.h"

namespace {

using namespace flux;
using namespace flux::engine;

double cpu_seconds() {
  rusage use{};
  getrusage(RUSAGE_SELF, &use);
  return static_cast<double>(use.ru_utime.tv_sec + use.ru_stime.tv_sec) +
         static_cast<double>(use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return fmt::print(stderr, "records_bench FILE cached|dropped|direct ...\n"), 2;
  const std::string_view word = argv[2];
  const FileAccess access = word == "direct"    ? FileAccess::kDirect
                            : word == "dropped" ? FileAccess::kDropped
                                                : FileAccess::kCached;
  const int passes = argc > 3 ? std::atoi(argv[3]) : 2, threads = argc > 4 ? std::atoi(argv[4]) : 2;
  const int64_t lookahead = argc > 5 ? std::atoi(argv[5]) : 1;
  const size_t records = argc > 6 ? static_cast<size_t>(std::atoi(argv[6])) : 12;
  const bool scratch = std::filesystem::is_directory(argv[1]);
  std::shared_ptr<RecordStore> store;
  if (scratch) {
    const int64_t record = block_layout({}, 0, at::kBFloat16).bytes() * 2;
    store = std::make_shared<FileArena>(argv[1], std::vector<int64_t>(records, record), access);
  } else {
    const auto file = std::make_shared<ModelFile>(argv[1], ModelFileOptions{.access = access});
    for (const FileStamp& stamp : file->stamps()) {  // begins with nothing of it in memory
      const int fd = open(stamp.path.c_str(), O_RDONLY);
      posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
      close(fd);
    }
    store = file;
  }
  std::vector<int64_t> blocks(static_cast<size_t>(store->num_records()));
  std::iota(blocks.begin(), blocks.end(), 0);
  Ring ring(store,
            at::Device(at::kCPU),
            forward_and_back(blocks),
            {.lookahead = lookahead, .read_threads = threads});
  for (int pass = 0; pass < passes; ++pass) {
    const auto before = ring.counts();
    const double cpu = cpu_seconds();
    const auto begin = std::chrono::steady_clock::now();
    for (size_t i = 0; i < blocks.size(); ++i)
      ring.release(ring.acquire(), scratch && pass % 2 == 1);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    const auto after = ring.counts();
    const auto bytes = static_cast<double>(after.bytes_read - before.bytes_read),
               written = static_cast<double>(after.bytes_written - before.bytes_written);
    fmt::print(
        "{} pass {}: read {:.1f} GB, wrote {:.1f}, in {:.1f} s: {:.2f} GB/s; CPU {:.1f} s; peak "
        "RSS {:.2f} GB\n",
        word,
        pass + 1,
        bytes / 1e9,
        written / 1e9,
        took.count(),
        (bytes + written) / 1e9 / took.count(),
        cpu_seconds() - cpu,
        static_cast<double>(peak_rss_bytes()) / 1e9);
  }
  return 0;
}
