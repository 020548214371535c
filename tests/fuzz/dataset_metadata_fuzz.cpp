// Any bytes as the metadata file of a dataset, as .json and as .jsonl: refused with an InputError, or
// read.
#include <cstdint>
#include <string>
#include <string_view>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/dataset/dataset.h"
#include "tests/support/temporary_folder.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux;
  static const test::TemporaryFolder folder;
  static const bool prepared = [] {
    log::start("dataset_metadata_fuzz", log::Level::kError);
    folder.write("images/a.png", "x");
    folder.write("images/b.jpg", "x");
    return true;
  }();
  (void)prepared;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  for (const std::string suffix : {"json", "jsonl"}) {
    folder.write("meta." + suffix, bytes);
    const auto toml = folder.write(
        "set.toml",
        "[[datasets]]\nresolution = 64\nenable_bucket = false\n[[datasets.subsets]]\nimage_dir = "
        "'images'\nmetadata_file = 'meta." +
            suffix + "'\n");
    for (const auto profile : {Profile::kDefault, Profile::kKohya}) {
      try {
        const auto resolved = dataset::resolve_file(toml, profile, {}, folder.path());
        for (const auto& image : resolved.images) (void)dataset::read_caption(resolved, image);
      } catch (const InputError&) {
      }
    }
  }
  return 0;
}
