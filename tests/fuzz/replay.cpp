// Runs a fuzz target on every file of the folders given: for compilers without libFuzzer.
#include <cstdint>
#include <cstdio>
#include <filesystem>

#include "common/core/file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  int64_t num_files = 0;
  for (int i = 1; i < argc; ++i) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(argv[i])) {
      if (!entry.is_regular_file()) continue;
      const std::string bytes = flux::read_file(entry.path());
      LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
      ++num_files;
    }
  }
  std::printf("replayed %lld files\n", static_cast<long long>(num_files));
  return num_files > 0 ? 0 : 1;
}
