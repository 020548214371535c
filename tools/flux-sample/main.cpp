// tools/flux-sample/main.cpp - latents of pictures from cached prompts.
#include "common/core/tool.h"
#include "pipelines/sample/options.h"
#include "pipelines/sample/run.h"

int main(int argc, char** argv) {
  return flux::run_tool("flux-sample", argc, argv, [](flux::Tool& tool) {
    flux::sample::Options opts;
    flux::sample::add_flags(opts, tool);
    if (!tool.parse()) return flux::ExitCode::kOk;
    flux::sample::check(opts);
    if (opts.plan != flux::sample::PlanOutput::kNone) return flux::sample::run_plan(opts);
    const auto report = flux::sample::run(opts);
    tool.summary(report.line(), report.object(), report.exit_code);
    return report.exit_code;
  });
}
