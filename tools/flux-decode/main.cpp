// tools/flux-decode/main.cpp - latents to pictures.
#include "common/core/tool.h"
#include "pipelines/decode/options.h"
#include "pipelines/decode/run.h"

int main(int argc, char** argv) {
  return flux::run_tool("flux-decode", argc, argv, [](flux::Tool& tool) {
    flux::decode::Options opts;
    flux::decode::add_flags(opts, tool);
    if (!tool.parse()) return flux::ExitCode::kOk;
    flux::decode::check(opts, tool);
    const auto report = flux::decode::run(opts);
    tool.summary(report.line(), report.object(), report.exit_code);
    return report.exit_code;
  });
}
