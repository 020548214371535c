// Any bytes as a dataset file, TOML and JSON, and as a caption: refused with an InputError, or read.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/dataset/dataset.h"
#include "tests/support/temporary_folder.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux;
  static const test::TemporaryFolder temporary;
  static const auto folder = [] {
    log::start("dataset_fuzz", log::Level::kError);
    temporary.write("images/a.png", "x");
    return temporary.path();
  }();
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  for (const char* name : {"input", "input.json"}) write_file_atomic(folder / name, text);
  for (const auto profile : {Profile::kDefault, Profile::kKohya}) {
    for (const char* name : {"input", "input.json"}) {
      try {
        const auto resolved =
            dataset::resolve_file(folder / name, profile, {{"resolution", "64"}}, folder);
        for (const auto& image : resolved.images) (void)dataset::read_caption(resolved, image);
        dataset::refuse_uncacheable(resolved);
      } catch (const InputError&) {
      }
    }
    try {
      const auto caption = dataset::read_caption_file(folder / "input", true, profile);
      dataset::CaptionOptions options;
      options.wildcards = options.shuffle = true;
      options.tag_dropout_rate = 0.5;
      if (caption.size() < 1000 && dataset::caption_variants(caption, options, 4, 1).size() > 4)
        std::abort();
    } catch (const InputError&) {
    }
  }
  return 0;
}
