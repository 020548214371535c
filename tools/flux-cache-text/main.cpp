// tools/flux-cache-text/main.cpp - encodes captions with CLIP and T5, once.
#include <nlohmann/json.hpp>

#include "common/core/tool.h"
#include "pipelines/text/options.h"
#include "pipelines/text/run.h"

int main(int argc, char** argv) {
  return flux::run_tool("flux-cache-text", argc, argv, [](flux::Tool& tool) {
    flux::text::Options opts;
    flux::text::add_flags(opts, tool);
    if (!tool.parse()) return flux::ExitCode::kOk;  // --help and --version end here
    flux::text::check(opts);
    const auto report = flux::text::run(opts);
    tool.summary(report.line(), report.json());
    return report.exit_code;
  });
}
