// tests/support/make_test_cache.cpp - DIR SAMPLES DTYPE: the caches DIR/latents and DIR/text of
// tests/support/cache_samples.h, of each sample DIR/expected/<key> with its decoded tensors, and
// DIR/journal with what a killed writer leaves.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "tests/support/cache_samples.h"

int main(int argc, char** argv) {
  using namespace flux;
  if (argc != 4) return 2;
  const std::filesystem::path folder = argv[1];
  const uint64_t num_samples = std::strtoull(argv[2], nullptr, 10);
  std::filesystem::create_directories(folder / "expected");
  for (const auto kind : {cache::Kind::kLatents, cache::Kind::kText}) {
    const cache::Recipe recipe = test::recipe(kind, argv[3]);
    const cache::Layout layout = cache::layout_of(kind, recipe.parameters);
    test::make_cache(folder / cache::kind_name(kind), recipe, 0, num_samples);
    cache::Writer killed(folder / "journal" / cache::kind_name(kind), recipe, test::provenance());
    for (uint64_t i = 0; i < num_samples; ++i) {
      const auto data = test::sample(layout, i);
      if (i < 3) killed.add(data.info, data.spans());
      std::ofstream file(folder / "expected" / to_hex(data.info.key), std::ios::binary);
      for (const auto& tensor : data.tensors) {
        file.write(reinterpret_cast<const char*>(tensor.data()),
                   static_cast<std::streamsize>(tensor.size()));
      }
    }
  }
}
