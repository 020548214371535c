// tools/flux-train/main.cpp - trains FLUX.1 on cached latents and text.
#include <cstdio>

#include "common/core/log.h"
#include "common/core/tool.h"
#include "pipelines/train/options.h"
#include "pipelines/train/reproduce.h"
#include "pipelines/train/run.h"
#include "pipelines/train/sd_scripts.h"

int main(int argc, char** argv) {
  return flux::run_tool("flux-train", argc, argv, [](flux::Tool& tool) {
    flux::train::Options opts;
    flux::train::add_flags(opts, tool);
    if (!tool.parse()) return flux::ExitCode::kOk;
    if (tool.given("import-sd-scripts")) {
      const auto imported = flux::train::import_sd_scripts(opts.import_sd_scripts);
      for (const std::string& text : imported.warnings) flux::log::warn("{}", text);
      std::fputs(imported.toml.c_str(), stdout);
      return flux::ExitCode::kOk;
    }
    flux::train::check(opts, tool);
    if (opts.plan != flux::train::PlanOutput::kNone) return flux::train::run_plan(opts);
    if (!opts.reproduce.empty()) {
      const auto again = flux::train::reproduce(opts);
      tool.summary(again.line(), again.object());
      return again.same() ? flux::ExitCode::kOk : flux::ExitCode::kDiffers;
    }
    const auto report = flux::train::run(opts);
    if (opts.launch.rank == 0) tool.summary(report.line(), report.object(), report.exit_code);
    return report.exit_code;
  });
}
