// tests/bench/index_bench.cpp - how long a trainer takes to know keys, buckets and links of a million
// samples: both caches' indexes are made, then opened and joined in a process of its own.
//
//   index_bench [--check] [ITEMS] [FOLDER]
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <string>

#include "common/core/file.h"
#include "common/data/training_data.h"
#include "formats/cache/reader.h"
#include "tests/bench/bench.h"

namespace {

using namespace flux;

constexpr double kLimitSeconds = 10, kLimitBytes = 1e9;
constexpr int64_t kPerSegment = 128;

/// An index and a manifest of `num_items` items in three buckets; segments are files of one byte,
/// since nothing here reads a sample.
void make(const std::filesystem::path& folder, cache::Kind kind, int64_t num_items) {
  std::filesystem::create_directories(folder);
  cache::Manifest manifest;
  manifest.recipe =
      kind == cache::Kind::kLatents ? bench::latents_recipe() : bench::text_recipe(false);
  const cache::Publication publication = bench::publication();
  manifest.plan = publication.plan;
  manifest.plan_digest = publication.plan_digest;
  manifest.num_items = manifest.num_samples = num_items;
  for (int64_t i = 0; i * kPerSegment < num_items; ++i) {
    cache::SegmentEntry entry{fmt::format("seg-{:016x}.h5", i), 1, std::string(32, '0'), 0};
    entry.num_samples = std::min(kPerSegment, num_items - i * kPerSegment);
    std::ofstream(folder / entry.name) << "x";
    manifest.segments.push_back(std::move(entry));
  }
  constexpr std::array<std::array<uint32_t, 2>, 3> kBuckets{{{128, 128}, {144, 112}, {112, 144}}};
  cache::Index index;
  for (int64_t i = 0; i < num_items; ++i) {
    const std::string path = fmt::format("photographs/{:03}/{:07}.jpg", i % 1000, i);
    cache::IndexItem item;
    item.item = dataset::item_digest(0, path);
    cache::IndexVariant variant;
    variant.key = sha256(fmt::format("{} {}", cache::kind_name(kind), i));
    variant.segment = static_cast<uint32_t>(i / kPerSegment);
    variant.row = static_cast<uint32_t>(i % kPerSegment);
    if (kind == cache::Kind::kLatents) {
      variant.height = kBuckets[static_cast<size_t>(i % 3)][0];
      variant.width = kBuckets[static_cast<size_t>(i % 3)][1];
    }
    index.add(item, path, {&variant, 1});
  }
  const auto bytes = cache::encode_index(index, kind);
  manifest.index_bytes = static_cast<int64_t>(bytes.size());
  manifest.index_xxh3_128 = xxh3_128_hex(bytes);
  std::ofstream(folder / cache::kIndexName, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  std::ofstream(folder / cache::kManifestName) << cache::manifest_text(manifest);
}

/// Runs `body` in a process of its own, so that its peak memory is its own too.
template <class Body>
bool apart(const Body& body) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    bool holds = false;
    try {
      holds = body();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "index_bench: %s\n", error.what());
    }
    std::fflush(stdout);
    _exit(holds ? 0 : 1);
  }
  int status = 1;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) &&
         WEXITSTATUS(status) == 0;
}

/// A row of the table; whether it holds.
bool row(const char* what, double seconds, double cpu, double limit_seconds, double limit_bytes) {
  const auto bytes = static_cast<double>(peak_rss_bytes());
  const bool holds = seconds < limit_seconds && bytes < limit_bytes;
  std::printf("| %-52s | %7.2f s | %7.2f s | %7.0f MB | %s |\n",
              what,
              seconds,
              cpu,
              bytes / 1e6,
              limit_seconds > 1e6 ? "      "
              : holds             ? "holds "
                                  : "MISSED");
  return holds;
}

}  // namespace

int main(int argc, char** argv) {
  bool check = false;
  std::vector<std::string> words;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--check")
      check = true;
    else
      words.emplace_back(argv[i]);
  }
  const int64_t num_items = words.empty() ? 1000000 : std::stoll(words[0]);
  const std::filesystem::path folder =
      words.size() > 1
          ? std::filesystem::path(words[1])
          : std::filesystem::temp_directory_path() / fmt::format("index_bench-{}", getpid());
  const bool made = apart([&] {
    make(folder / "latents", cache::Kind::kLatents, num_items);
    make(folder / "text", cache::Kind::kText, num_items);
    return true;
  });
  if (!made) return 1;

  std::printf("%lld items; limit of the join: %.0f s, %.0f MB\n\n",
              static_cast<long long>(num_items),
              kLimitSeconds,
              kLimitBytes / 1e6);
  std::printf("| %-52s | %9s | %9s | %10s |        |\n", "what", "clock", "CPU", "peak RSS");
  std::printf("|%s|%s|%s|%s|--------|\n",
              std::string(54, '-').c_str(),
              std::string(11, '-').c_str(),
              std::string(11, '-').c_str(),
              std::string(12, '-').c_str());
  constexpr double kNone = 1e9;
  apart([&] {
    const double start = bench::wall_seconds(), cpu = bench::cpu_seconds();
    const cache::Cache latents(folder / "latents", cache::Kind::kLatents);
    const double seconds = bench::wall_seconds() - start;
    return row("manifest and index of the latents alone",
               seconds,
               bench::cpu_seconds() - cpu,
               kNone,
               kNone * kNone);
  });
  const bool holds = apart([&] {
    const double start = bench::wall_seconds(), cpu = bench::cpu_seconds();
    const TrainingData data(folder / "latents", folder / "text", {.seed = 1});
    if (data.num_items() != num_items || data.buckets().size() != std::min<size_t>(3, num_items))
      return false;
    bool good = row("keys, buckets and links of both (TrainingData)",
                    bench::wall_seconds() - start,
                    bench::cpu_seconds() - cpu,
                    kLimitSeconds,
                    kLimitBytes);
    const auto order = data.epoch_batches(0);
    if (static_cast<int64_t>(order.size()) != num_items) return false;
    good = row("and the order of the first epoch",
               bench::wall_seconds() - start,
               bench::cpu_seconds() - cpu,
               kLimitSeconds,
               kLimitBytes) &&
           good;
    const std::string latents = data.latents_digest(), text = data.text_digest();
    good = row("and the digests of both, for resuming",
               bench::wall_seconds() - start,
               bench::cpu_seconds() - cpu,
               kLimitSeconds,
               kLimitBytes) &&
           good;
    return good;
  });
  std::error_code ignored;
  if (words.size() < 2) std::filesystem::remove_all(folder, ignored);
  return check && !holds ? 1 : 0;
}
