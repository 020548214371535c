// tests/bench/cache_read_bench.cpp - samples a second from a cache of 1024x1024 pictures in random
// order, warm, against pread and zstd alone on the very same frames; cache_bench.py compares it with
// sd-scripts' npz.
//
//   cache_read_bench make DIR SAMPLES full|masked
//   cache_read_bench read DIR SECONDS     one JSON object: samples a second, on the clock and of CPU
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <fcntl.h>
#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <numeric>
#include <thread>

#include "common/data/training_data.h"
#include "formats/cache/reader.h"
#include "formats/cache/segment_reader.h"
#include "tests/bench/bench.h"

namespace {

using namespace flux;

struct Frame {
  int64_t offset = 0, bytes = 0;
};
/// Latents, T5 and CLIP of one sample in the flat file.
using Frames = std::array<Frame, 3>;

void make(const std::filesystem::path& folder, int64_t num_samples, bool masked) {
  std::filesystem::create_directories(folder);
  bench::Numbers numbers(1);
  cache::Writer latents(folder / "latents", bench::latents_recipe(), bench::provenance()),
      text(folder / "text", bench::text_recipe(masked), bench::provenance());
  cache::Publication latents_items = bench::publication(), text_items = latents_items;
  for (int64_t i = 0; i < num_samples; ++i) {
    const int64_t live = masked ? 60 + i * 37 % 61 : 512;
    cache::SampleInfo image, caption;
    image.key = sha256(fmt::format("image {}", i));
    image.height = image.width = 128;
    image.original_hw = image.resized_hw = {1024, 1024};
    const auto stored = numbers.latents(128, 128);
    latents.add(image, {{stored}});
    latents_items.items.push_back(bench::wanted(i, image.key));
    caption.key = sha256(fmt::format("caption {}", i));
    caption.text = fmt::format("caption {}", i);
    caption.t5_tokens = static_cast<uint32_t>(live);
    const auto prompt = numbers.prompt(live), pooled = numbers.pooled();
    text.add(caption, {{prompt, pooled}});
    text_items.items.push_back(bench::wanted(i, caption.key));
  }
  latents.publish(latents_items);
  text.publish(text_items);

  // the same frames, one after the other
  std::ofstream flat(folder / "flat", std::ios::binary), table(folder / "table", std::ios::binary);
  const cache::Cache a(folder / "latents", cache::Kind::kLatents),
      b(folder / "text", cache::Kind::kText);
  int64_t offset = 0;
  for (int64_t i = 0; i < num_samples; ++i) {
    Frames frames;
    size_t k = 0;
    for (const cache::Cache* cache : {&a, &b}) {
      const auto& variant = cache->index().variants(i)[0];
      const cache::Segment segment(cache->folder() /
                                   cache->manifest().segments[variant.segment].name);
      for (const auto& frame : segment.record(variant.row).frames) {
        flat.write(reinterpret_cast<const char*>(frame.data()),
                   static_cast<std::streamsize>(frame.size()));
        frames[k++] = {offset, static_cast<int64_t>(frame.size())};
        offset += static_cast<int64_t>(frame.size());
      }
    }
    table.write(reinterpret_cast<const char*>(&frames), sizeof frames);
  }
}

int64_t folder_bytes(const std::filesystem::path& folder) {
  int64_t sum = 0;
  for (const auto& file : std::filesystem::directory_iterator(folder))
    sum += static_cast<int64_t>(file.file_size());
  return sum;
}

/// What one thread reads into.
struct Buffers {
  std::vector<std::byte> compressed = std::vector<std::byte>(size_t{8} << 20);
  std::array<std::vector<std::byte>, 3> tensors{std::vector<std::byte>(size_t{2} * 32 * 128 * 128),
                                                std::vector<std::byte>(size_t{2} * 512 * 4096),
                                                std::vector<std::byte>(size_t{2} * 768)};
};

void fail(const char* what) {
  std::fprintf(stderr, "cache_read_bench: %s\n", what);
  std::exit(1);
}

struct Rate {
  double per_second = 0, per_cpu_second = 0;
};

/// Reads samples 0, 1, ... of a random order in `num_threads` threads for `seconds`.
template <class Read>
Rate rate(int num_threads, double seconds, int64_t num_samples, const Read& read) {
  std::vector<Rate> threads(static_cast<size_t>(num_threads));
  std::vector<int64_t> counts(threads.size());
  const double start = bench::wall_seconds(), cpu = bench::cpu_seconds();
  {
    std::vector<std::jthread> running;
    for (size_t t = 0; t < threads.size(); ++t) {
      running.emplace_back([&, t] {
        std::vector<int64_t> order(static_cast<size_t>(num_samples));
        std::iota(order.begin(), order.end(), 0);
        std::mt19937_64 random(t);
        Buffers buffers;
        while (bench::wall_seconds() < start + seconds) {
          std::shuffle(order.begin(), order.end(), random);
          for (const int64_t i : order) {
            read(i, buffers);
            ++counts[t];
            if (bench::wall_seconds() >= start + seconds) break;
          }
        }
      });
    }
  }
  const auto count = static_cast<double>(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
  return {count / (bench::wall_seconds() - start), count / (bench::cpu_seconds() - cpu)};
}

void measure(const std::filesystem::path& folder, double seconds) {
  at::set_num_threads(1);
  const TrainingData data(folder / "latents", folder / "text", {.seed = 1, .batch_size = 1});
  const cache::Cache latents(folder / "latents", cache::Kind::kLatents),
      text(folder / "text", cache::Kind::kText);
  const int64_t n = latents.index().num_items();
  std::vector<Frames> table(static_cast<size_t>(n));
  std::ifstream(folder / "table", std::ios::binary)
      .read(reinterpret_cast<char*>(table.data()),
            static_cast<std::streamsize>(table.size() * sizeof(Frames)));
  const int flat = open((folder / "flat").c_str(), O_RDONLY | O_CLOEXEC);
  if (flat < 0) fail("no flat file");

  const auto raw = [&](int64_t i, Buffers& to) {
    thread_local ZSTD_DCtx* const context = ZSTD_createDCtx();
    for (size_t k = 0; k < 3; ++k) {
      const Frame& frame = table[static_cast<size_t>(i)][k];
      const auto bytes = static_cast<size_t>(frame.bytes);
      if (pread(flat, to.compressed.data(), bytes, frame.offset) != frame.bytes) fail("short read");
      auto& out = to.tensors[k];
      if (ZSTD_decompressDCtx(context, out.data(), out.size(), to.compressed.data(), bytes) !=
          out.size())
        fail("damaged frame");
    }
  };
  const auto ours = [&](int64_t i, Buffers& to) {
    const std::array<std::span<std::byte>, 1> image{to.tensors[0]};
    const std::array<std::span<std::byte>, 2> caption{to.tensors[1], to.tensors[2]};
    latents.read_into(latents.index().variants(i)[0], image);
    text.read_into(text.index().variants(i)[0], caption);
  };
  const auto batch = [&](int64_t i, Buffers&) { data.load(0, i, {{i, 0}}); };

  nlohmann::json out;
  const auto add = [&](const char* name, int threads, const auto& read) {
    const Rate one = rate(threads, seconds, n, read);
    out[name] = {{"per_second", one.per_second}, {"per_cpu_second", one.per_cpu_second}};
  };
  Buffers warm;
  for (int64_t i = 0; i < n; ++i) raw(i, warm), ours(i, warm);
  add("raw", 1, raw);
  add("cache", 1, ours);
  add("cache 2 threads", 2, ours);
  add("raw 2 threads", 2, raw);
  add("batch", 1, batch);
  add("batch 2 threads", 2, batch);
  out["bytes_a_sample"] = (folder_bytes(folder / "latents") + folder_bytes(folder / "text")) / n;
  std::cout << out.dump() << "\n";
  close(flat);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "make" && argc == 5) {
    make(argv[2], std::stoll(argv[3]), std::string(argv[4]) == "masked");
  } else if (what == "read" && argc == 4) {
    measure(argv[2], std::stod(argv[3]));
  } else {
    std::fprintf(stderr, "cache_read_bench make DIR SAMPLES full|masked | read DIR SECONDS\n");
    return 2;
  }
  return 0;
}
