#include "pipelines/check/options.h"

#include "common/core/error.h"

namespace flux::check {

void add_flags(Options& options, Tool& tool) {
  tool.about(
      "Runs reference cases (folders with case.json) through this build and says of each tensor "
      "whether it agrees.",
      "flux-check tests/golden/models");
  tool.arguments(options.folders, "DIR...", "folders to look for cases in, at any depth");
  tool.flag("precision",
            options.precision,
            Choices<Precision>{{"f32", Precision::kF32}, {"bf16", Precision::kBF16}},
            "bf16 judges outputs by the cases' bf16 limits and skips kinds without");
  tool.flag("device", options.device, device_choices(), "where networks run");
}

void check(const Options& options) {
  if (options.folders.empty())
    throw UsageError("no folder given", "flux-check tests/golden/models");
}

}  // namespace flux::check
