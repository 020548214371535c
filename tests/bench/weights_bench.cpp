// tests/bench/weights_bench.cpp - loading a transformer into memory and saving it, as flux-train does; weights_bench.py
// compares it with the peers.
//
//   weights_bench load FILE cold|warm     prints seconds and bytes
//   weights_bench save FILE OUT           prints seconds, fsync included, and the memory that saving took
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <string_view>
#include <vector>

#include "common/core/file.h"
#include "common/engine/model_blocks.h"
#include "common/engine/model_file.h"
#include "common/models/flux/names.h"
#include "common/tensor/memory.h"
#include "common/tensor/tensor.h"
#include "formats/safetensors/writer.h"

namespace {

using namespace flux;
using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void forget(const std::filesystem::path& path) {
  const int fd = open(path.c_str(), O_RDONLY);
  fdatasync(fd);
  posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  close(fd);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4)
    return fmt::print(stderr, "weights_bench load FILE cold|warm, or save FILE OUT\n"), 2;
  const bool load = argv[1] == std::string_view("load");
  const std::filesystem::path path = argv[2];
  count_tensor_memory();
  if (load && argv[3] == std::string_view("cold")) forget(path);
  const auto optimizer = make_optimizer(AdafactorOptions{});  // whose states are small
  const auto start = Clock::now();
  const auto file = std::make_shared<engine::ModelFile>(path);
  engine::ModelBlocks model(file->config(), file, *optimizer, {.train_weights = !load});
  const double loaded = since(start);
  std::vector<safetensors::TensorSpec> tensors;
  uint64_t bytes = 0;
  for (const auto& [name, shape] : dit::tensor_shapes(file->config())) {
    tensors.push_back({name, DType::kBF16, shape});
    bytes += safetensors::tensor_bytes(DType::kBF16, shape);
  }
  if (load) {
    fmt::print("{{\"seconds\": {:.4f}, \"bytes\": {}}}\n", loaded, bytes);
    return 0;
  }
  const auto before = static_cast<int64_t>(peak_rss_bytes());
  const auto saving = Clock::now();
  safetensors::ScatteredWriter writer(argv[3], tensors, safetensors::pt_metadata());
  model.for_all_trainables([&](engine::Trainable& t) {
    writer.write(t.name, host_bytes(t.value.detach()));
    return false;
  });
  writer.commit();
  fmt::print("{{\"seconds\": {:.4f}, \"bytes\": {}, \"extra\": {}}}\n",
             since(saving),
             bytes,
             static_cast<int64_t>(peak_rss_bytes()) - before);
  return 0;
}
